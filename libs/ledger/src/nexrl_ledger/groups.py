"""The records of groups, of their newest checkpoints, and of the processes that serve them."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from nexrl_contract import names
from nexrl_contract.errors import ServiceError
from nexrl_contract.records import (
    GroupRecord,
    LatestCheckpoint,
    ProcessRecord,
    Share,
    encode_fields,
)
from pydantic import ValidationError

from nexrl_ledger.consumer import drop_queue
from nexrl_ledger.scripts import Database, Fenced

PROCESS_TTL_S = 15
_log = logging.getLogger(__name__)


class Groups:
    """Worker groups: their incarnations, their ends, and what a restart has lost."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def identifiers(self) -> list[str]:
        """Names of the living groups, sorted."""
        return sorted(self._db.client.smembers(names.GROUPS_KEY))

    def get(self, identifier: str) -> GroupRecord | None:
        """The record of a group, None when it is unknown; a destroyed one is kept for a day at
        most."""
        fields = self._db.client.hgetall(names.group_key(identifier))
        return GroupRecord.from_hash(fields) if "identifier" in fields else None

    def living(self) -> list[GroupRecord]:
        """All living groups, by name."""
        found = self._db.hashes(map(names.group_key, self.identifiers()))
        return [GroupRecord.from_hash(fields) for fields in found if "identifier" in fields]

    def update(self, identifier: str, epoch: int | None = None, **fields: Any) -> None:
        """Set fields of a group (None deletes one); raises :class:`Fenced` when ``epoch`` is not
        the current one, or has ended."""
        encoded = encode_fields(fields)
        pairs = [item for name in fields for item in (name, encoded.get(name, ""))]
        key = names.group_key(identifier)
        if self._db.run("update_group", [key], epoch=epoch, fields=pairs) != "OK":
            raise _fenced(identifier, epoch)

    def start_epoch(self, identifier: str, placement: Sequence[Share]) -> int:
        """Begin a new incarnation of a group where ``placement`` says; raises :class:`Fenced` when
        the group is gone."""
        shares = json.dumps([share.model_dump() for share in placement])
        key = names.group_key(identifier)
        epoch = int(self._db.run("start_epoch", [key], placement=shares, now=time.time()))
        if epoch < 0:
            raise Fenced(f"group {identifier!r} is gone")
        return epoch

    def mark_down(
        self,
        identifier: str,
        epoch: int | None,
        cause: str,
        *,
        rank: int | None = None,
        kept: int | None = None,
    ) -> None:
        """The group has failed: state ``down`` with its cause, and every job that waits for it
        fails.

        A ``destroy`` among them has what it asks for: it finishes, and the group is destroyed. What
        was applied after ``kept`` is rolled back in the same step: a group rolled back and not yet
        down would pass for one that has lost nothing.
        """
        queued = ServiceError(
            "GROUP_DOWN",
            f"the group went down before it ran this: {cause}",
            retryable=False,
            identifier=identifier,
        )
        running = _went_down(identifier, cause, rank)
        self._end(identifier, epoch, running, queued, state="down", cause=cause or None, seq=kept)

    def mark_destroyed(
        self, identifier: str, epoch: int | None, *, cause: str | None = None
    ) -> None:
        """The group is gone; its record stays for a while, jobs that still wait fail, and the
        ``destroy`` is finished.

        All at once: a destroy that stayed behind unfinished would stand before every job of the
        next group of that name. ``cause`` says why the job that was running failed, where the group
        went down before it was destroyed.
        """
        queued = ServiceError(
            "GROUP_NOT_READY", "the group was destroyed before it ran this", identifier=identifier
        )
        running = queued if cause is None else _went_down(identifier, cause)
        self._end(identifier, epoch, running, queued, state="destroyed")

    def _end(
        self,
        identifier: str,
        epoch: int | None,
        running: ServiceError,
        queued: ServiceError,
        **args: object,
    ) -> None:
        queue = names.train_queue(identifier)
        ended = self._db.run(
            "end_group",
            [
                names.group_key(identifier),
                names.waiting_key(queue),
                names.applied_key(identifier),
                names.GROUPS_KEY,
                names.DESTROYED_KEY,
            ],
            epoch=epoch,
            now=time.time(),
            running_error=json.dumps(running.body()),
            queued_error=json.dumps(queued.body()),
            **args,
        )
        if ended == "FENCED":
            raise _fenced(identifier, epoch)
        if ended == "destroyed":
            drop_queue(self._db.client, queue)

    def roll_back(self, identifier: str, epoch: int, seq: int) -> int:
        """Mark what was applied after ``seq`` as rolled back and set the group's ``seq``; returns
        how many jobs that were."""
        keys = [names.group_key(identifier), names.applied_key(identifier)]
        count = int(self._db.run("roll_back", keys, epoch=epoch, seq=seq))
        if count < 0:
            raise _fenced(identifier, epoch)
        return count


def _fenced(identifier: str, epoch: int | None) -> Fenced:
    return Fenced(f"epoch {epoch} of {identifier!r} has been replaced")


def _went_down(identifier: str, cause: str, rank: int | None = None) -> ServiceError:
    message = f"the group went down while it ran this: {cause}"
    return ServiceError("OPERATION_FAILED", message, identifier=identifier, rank=rank)


class Checkpoints:
    """Which checkpoint of a group is its newest one, of each kind (full, weight-only, Hugging
    Face)."""

    def __init__(self, db: Database) -> None:
        self._client = db.client

    def latest(self, identifier: str, kind: str) -> LatestCheckpoint | None:
        """None where nothing is recorded, or nothing that can be read."""
        text = self._client.hget(names.CHECKPOINTS_KEY, f"{identifier}:{kind}")
        try:
            return LatestCheckpoint.model_validate_json(text) if text else None
        except ValidationError:
            _log.warning("checkpoint.unreadable identifier=%s kind=%s", identifier, kind)
            return None

    def record(self, identifier: str, kind: str, latest: LatestCheckpoint) -> None:
        """This one is the newest now."""
        self._client.hset(names.CHECKPOINTS_KEY, f"{identifier}:{kind}", latest.model_dump_json())

    def forget_destroyed(self) -> None:
        """Drop what is recorded of groups that are no more; their files stay."""
        fields = self._client.hkeys(names.CHECKPOINTS_KEY)
        if fields:
            living = self._client.smembers(names.GROUPS_KEY)
            gone = [field for field in fields if field.partition(":")[0] not in living]
            if gone:
                self._client.hdel(names.CHECKPOINTS_KEY, *gone)


class Presence:
    """Processes of one kind, for as long as they are heard: ``index`` holds their names."""

    def __init__(self, db: Database, index: str, key_of: Callable[[str], str]) -> None:
        self._db = db
        self._index = index
        self._key_of = key_of

    def beat(self, record: ProcessRecord) -> None:
        """Register a process and its state for the next seconds."""
        key = self._key_of(record.name)
        with self._db.client.pipeline() as pipe:
            pipe.sadd(self._index, record.name)
            pipe.hset(key, mapping=record.model_copy(update={"heartbeat": time.time()}).to_hash())
            pipe.expire(key, PROCESS_TTL_S)
            pipe.execute()

    def sign_off(self, name: str) -> None:
        """Forget a process that stops."""
        self._db.client.srem(self._index, name)
        self._db.client.delete(self._key_of(name))

    def heard(self) -> list[ProcessRecord]:
        """Those heard of in the last seconds, by name."""
        found = []
        members: list[str] = sorted(self._db.client.smembers(self._index))
        for name, fields in zip(members, self._db.hashes(map(self._key_of, members)), strict=True):
            if fields:
                found.append(ProcessRecord.from_hash(fields))
            else:
                self._db.client.srem(self._index, name)
        return found
