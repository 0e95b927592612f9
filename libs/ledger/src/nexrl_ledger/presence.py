"""Who is there: agents and checkpointers, for as long as they are heard."""

from __future__ import annotations

import time
from collections.abc import Callable

from nexrl_contract import names
from nexrl_contract.records import AgentRecord

from nexrl_ledger.base import LedgerPart

AGENT_TTL_S = 15


class Presence(LedgerPart):
    """See :class:`nexrl_ledger.Ledger`."""

    def beat(self, record: AgentRecord, *, checkpointer: bool = False) -> None:
        """Register a process and its state for the next seconds."""
        key = names.checkpointer_key(record.name) if checkpointer else names.agent_key(record.name)
        with self.client.pipeline() as pipe:
            pipe.sadd(names.CHECKPOINTERS_KEY if checkpointer else names.AGENTS_KEY, record.name)
            pipe.hset(key, mapping=record.model_copy(update={"heartbeat": time.time()}).to_hash())
            pipe.expire(key, AGENT_TTL_S)
            pipe.execute()

    def sign_off(self, name: str, *, checkpointer: bool = False) -> None:
        """Forget a process that stops."""
        self.client.srem(names.CHECKPOINTERS_KEY if checkpointer else names.AGENTS_KEY, name)
        self.client.delete(names.checkpointer_key(name) if checkpointer else names.agent_key(name))

    def agents(self) -> list[AgentRecord]:
        """Agents heard of in the last seconds, by name."""
        return self._alive(names.AGENTS_KEY, names.agent_key)

    def checkpointers(self) -> list[AgentRecord]:
        """Checkpointers heard of in the last seconds, by name."""
        return self._alive(names.CHECKPOINTERS_KEY, names.checkpointer_key)

    def _alive(self, index: str, key_of: Callable[[str], str]) -> list[AgentRecord]:
        found = []
        members: list[str] = sorted(self.client.smembers(index))
        for name, fields in zip(members, self.hashes(map(key_of, members)), strict=True):
            if fields:
                found.append(AgentRecord.from_hash(fields))
            else:
                self.client.srem(index, name)
        return found
