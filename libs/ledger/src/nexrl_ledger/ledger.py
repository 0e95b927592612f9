"""The operation ledger: the truth about every job, group and agent. RQ may lose, double or reorder
wake-ups without harm."""

from __future__ import annotations

from nexrl_contract import names

from nexrl_ledger.checkpoints import CheckpointRecords
from nexrl_ledger.connection import redis_fault
from nexrl_ledger.groups import GroupRecords
from nexrl_ledger.jobs import JobRecords
from nexrl_ledger.presence import Presence
from nexrl_ledger.retention import Retention


class Ledger(JobRecords, GroupRecords, CheckpointRecords, Presence, Retention):
    """All records, by way of one client, which nobody else uses."""

    def close(self) -> None:
        """End the connections."""
        self.client.close()

    def fault(self) -> str | None:
        """Why this Redis may lose what it has acknowledged; see
        :func:`nexrl_ledger.redis_fault`."""
        return redis_fault(self.client)

    def mark(self) -> str | None:
        """What :meth:`set_mark` wrote into this Redis: it tells one from another, and from itself
        after it was emptied."""
        text: str | None = self.client.get(names.LEDGER_KEY)
        return text

    def set_mark(self, text: str, *, only_new: bool) -> None:
        """Mark this Redis; with ``only_new`` unless it has a mark."""
        self.client.set(names.LEDGER_KEY, text, nx=only_new)

    def payloads_in_use(self) -> set[str]:
        """Ids of the payloads that jobs which have not ended still need."""
        queues = [
            names.AGENT_QUEUE,
            names.CHECKPOINT_QUEUE,
            *(names.train_queue(name) for name in self.identifiers()),
        ]
        return {
            job.payload.id
            for queue in queues
            for job in self.waiting(queue)
            if job.payload is not None
        }
