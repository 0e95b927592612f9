"""Which checkpoint of a group is its newest one, by kind."""

from __future__ import annotations

import logging

from nexrl_contract import names
from nexrl_contract.records import LatestCheckpoint
from pydantic import ValidationError

from nexrl_ledger.base import LedgerPart

_log = logging.getLogger(__name__)


class CheckpointRecords(LedgerPart):
    """See :class:`nexrl_ledger.Ledger`. Of each kind (full, weight-only, Hugging Face) a group has
    one newest."""

    def latest_checkpoint(self, identifier: str, kind: str) -> LatestCheckpoint | None:
        """None where nothing is recorded, or nothing that can be read."""
        text = self.client.hget(names.CHECKPOINTS_KEY, f"{identifier}:{kind}")
        try:
            return LatestCheckpoint.model_validate_json(text) if text else None
        except ValidationError:
            _log.warning("checkpoint.unreadable identifier=%s kind=%s", identifier, kind)
            return None

    def record_checkpoint(self, identifier: str, kind: str, latest: LatestCheckpoint) -> None:
        """This one is the newest now."""
        self.client.hset(names.CHECKPOINTS_KEY, f"{identifier}:{kind}", latest.model_dump_json())

    def forget_destroyed_checkpoints(self) -> None:
        """Drop what is recorded of groups that are no more; their files stay."""
        fields = self.client.hkeys(names.CHECKPOINTS_KEY)
        if fields:
            living = self.client.smembers(names.GROUPS_KEY)
            gone = [field for field in fields if field.partition(":")[0] not in living]
            if gone:
                self.client.hdel(names.CHECKPOINTS_KEY, *gone)
