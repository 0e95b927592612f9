"""Groups whose agent never came back: after a while of silence they are down, so that every job for them ends."""

from __future__ import annotations

import logging
import time

from nexrl_contract.records import GroupRecord
from nexrl_ledger import Fenced, Ledger

PATIENCE_S = 150.0
_LIVING = ("starting", "up", "ready")
_log = logging.getLogger(__name__)


class LostGroups:
    """Remembers since when it has seen each group silent. A stack that starts again has ``PATIENCE_S`` to bring its groups back."""

    def __init__(self, ledger: Ledger, patience_s: float = PATIENCE_S) -> None:
        self._ledger = ledger
        self._patience_s = patience_s
        self._silent_since: dict[tuple[str, int], float] = {}

    def look(self) -> list[str]:
        """One look; the identifiers of groups that it took down. Raises RedisError, after which :meth:`forget` is due."""
        now = time.monotonic()
        heard = {agent.name for agent in self._ledger.agents()}
        silent = [group for group in self._ledger.groups() if self._is_silent(group, heard)]
        keys = {(group.identifier, group.epoch) for group in silent}
        self._silent_since = {key: self._silent_since.get(key, now) for key in keys}
        return [group.identifier for group in silent if self._end(group, now)]

    def forget(self) -> None:
        """Begin anew: while Redis was away nobody could be heard."""
        self._silent_since.clear()

    def _is_silent(self, group: GroupRecord, heard: set[str]) -> bool:
        quiet_s = time.time() - (group.heartbeat or group.created_at)
        return group.state in _LIVING and group.agent not in heard and quiet_s > self._patience_s

    def _end(self, group: GroupRecord, now: float) -> bool:
        if now - self._silent_since[group.identifier, group.epoch] < self._patience_s:
            return False
        cause = f"agent {group.agent} has not been heard for {self._patience_s:g} s; its ranks and their weights are taken for lost"
        try:
            self._ledger.group_down(group.identifier, group.epoch, cause)
        except Fenced:
            return False
        _log.error("group.lost identifier=%s epoch=%d agent=%s", group.identifier, group.epoch, group.agent)
        return True
