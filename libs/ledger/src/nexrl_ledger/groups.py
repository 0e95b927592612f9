"""The records of groups: incarnations, ends, and what a restart has lost."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from nexrl_contract import names
from nexrl_contract.errors import ServiceError
from nexrl_contract.records import GroupRecord, Share, encode_fields

from nexrl_ledger.base import Fenced, LedgerPart, optional
from nexrl_ledger.consumer import drop_queue


class GroupRecords(LedgerPart):
    """See :class:`nexrl_ledger.Ledger`."""

    def identifiers(self) -> list[str]:
        """Names of the living groups, sorted."""
        return sorted(self.client.smembers(names.GROUPS_KEY))

    def group(self, identifier: str) -> GroupRecord | None:
        """The record of a group, None when it is unknown; a destroyed one is kept for a day at
        most."""
        fields = self.client.hgetall(names.group_key(identifier))
        return GroupRecord.from_hash(fields) if "identifier" in fields else None

    def groups(self) -> list[GroupRecord]:
        """All living groups, by name."""
        found = self.hashes(names.group_key(name) for name in self.identifiers())
        return [GroupRecord.from_hash(fields) for fields in found if "identifier" in fields]

    def update_group(self, identifier: str, epoch: int | None = None, **fields: Any) -> None:
        """Set fields of a group (None deletes one); raises :class:`Fenced` when ``epoch`` is not
        the current one, or has ended."""
        encoded = encode_fields(fields)
        settings = [item for name in fields for item in (name, encoded.get(name, ""))]
        if (
            self._script["update_group"](
                keys=[names.group_key(identifier)], args=[optional(epoch), *settings]
            )
            != "OK"
        ):
            raise Fenced(f"epoch {epoch} of {identifier!r} has been replaced")

    def start_epoch(self, identifier: str, placement: Sequence[Share]) -> int:
        """Begin a new incarnation of a group where ``placement`` says; raises :class:`Fenced` when
        the group is gone."""
        shares = json.dumps([share.model_dump() for share in placement])
        epoch = int(
            self._script["start_epoch"](
                keys=[names.group_key(identifier)], args=[shares, time.time()]
            )
        )
        if epoch < 0:
            raise Fenced(f"group {identifier!r} is gone")
        return epoch

    def group_down(
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
        message = f"the group went down before it ran this: {cause}"
        queued = ServiceError("GROUP_DOWN", message, retryable=False, identifier=identifier)
        self._end_group(
            identifier, epoch, "down", cause, _went_down(identifier, cause, rank), queued, kept
        )

    def group_destroyed(
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
        self._end_group(identifier, epoch, "destroyed", "", running, queued, None)

    def _end_group(
        self,
        identifier: str,
        epoch: int | None,
        state: str,
        cause: str,
        running: ServiceError,
        queued: ServiceError,
        kept: int | None,
    ) -> None:
        queue = names.train_queue(identifier)
        errors = [json.dumps(error.body()) for error in (running, queued)]
        ended = self._script["end_group"](
            keys=[
                names.group_key(identifier),
                names.waiting_key(queue),
                names.applied_key(identifier),
            ],
            args=[optional(epoch), state, cause, time.time(), *errors, optional(kept)],
        )
        if ended == "FENCED":
            raise Fenced(f"epoch {epoch} of {identifier!r} has been replaced")
        if ended == "destroyed":
            drop_queue(self.client, queue)

    def roll_back(self, identifier: str, epoch: int, seq: int) -> int:
        """Mark what was applied after ``seq`` as rolled back and set the group's ``seq``; returns
        how many jobs that were."""
        count = int(
            self._script["roll_back"](
                keys=[names.group_key(identifier), names.applied_key(identifier)],
                args=[epoch, seq],
            )
        )
        if count < 0:
            raise Fenced(f"epoch {epoch} of {identifier!r} has been replaced")
        return count


def _went_down(identifier: str, cause: str, rank: int | None = None) -> ServiceError:
    message = f"the group went down while it ran this: {cause}"
    return ServiceError("OPERATION_FAILED", message, identifier=identifier, rank=rank)
