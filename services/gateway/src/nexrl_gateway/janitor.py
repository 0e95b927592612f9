"""Takes away payloads and records that nobody needs any more, of all replicas one at a time; and
ends groups whose agent is gone."""

from __future__ import annotations

import asyncio
import logging
import time

import redis
from anyio.to_thread import run_sync
from nexrl_contract.errors import ServiceError
from nexrl_contract.names import RESULT_TTL_S
from nexrl_contract.records import GroupRecord
from nexrl_ledger import Fenced, Ledger
from nexrl_payloads import RESULT_SUFFIX

from nexrl_gateway.services import Services

PERIOD_S = 60.0
_log = logging.getLogger(__name__)


async def keep_clean(services: Services) -> None:
    """Sweep once a period until cancelled; a store or Redis that is away is tried again the next
    time."""
    lost = LostGroups(services.ledger)
    while True:
        try:
            await run_sync(sweep, services)
            await run_sync(lost.look)
        except (redis.exceptions.RedisError, ServiceError) as error:
            lost.forget()
            _log.warning("janitor.failed error=%s", error)
        await asyncio.sleep(_period_s(services))


def sweep(services: Services) -> list[str]:
    """One sweep, unless another replica has just made one; the ids of what was removed."""
    ledger, settings = services.ledger, services.settings
    if not ledger.may_sweep(_period_s(services)):
        return []
    in_use = ledger.payloads_in_use()
    removed = services.store.sweep(
        in_use, result_age_s=RESULT_TTL_S, upload_age_s=settings.upload_kept_s
    )
    dropped = ledger.drop_finished(settings.jobs_kept, settings.jobs_kept_s)
    groups = ledger.drop_destroyed(settings.jobs_kept_s)
    due = ledger.take_due_results(settings.result_kept_s)
    for job_id in due:
        services.store.delete(f"{job_id}{RESULT_SUFFIX}")
    ledger.forget_results(due)
    if removed or dropped or groups or due:
        swept = (len(removed), dropped, groups, len(due))
        _log.info("janitor.swept payloads=%d jobs=%d groups=%d results=%d", *swept)
    return removed


def _period_s(services: Services) -> float:
    """A minute, or half of the shortest time that something is kept."""
    settings = services.settings
    return min(
        PERIOD_S, settings.result_kept_s / 2, settings.upload_kept_s / 2, settings.jobs_kept_s / 2
    )


PATIENCE_S = 150.0
_LIVING = ("starting", "up", "ready")
_log = logging.getLogger(__name__)


class LostGroups:
    """Remembers since when it has seen each group silent. A stack that starts again has
    ``PATIENCE_S`` to bring its groups back."""

    def __init__(self, ledger: Ledger, patience_s: float = PATIENCE_S) -> None:
        self._ledger = ledger
        self._patience_s = patience_s
        self._silent_since: dict[tuple[str, int], float] = {}

    def look(self) -> list[str]:
        """One look; the identifiers of groups that it took down. Raises RedisError, after which
        :meth:`forget` is due."""
        now = time.monotonic()
        heard = {agent.name for agent in self._ledger.agents()}
        silent = [group for group in self._ledger.groups() if self._is_silent(group, heard)]
        keys = {(group.identifier, group.epoch) for group in silent}
        self._silent_since = {key: self._silent_since.get(key, now) for key in keys}
        return [group.identifier for group in silent if self._end(group, heard, now)]

    def forget(self) -> None:
        """Begin anew: while Redis was away nobody could be heard."""
        self._silent_since.clear()

    def _is_silent(self, group: GroupRecord, heard: set[str]) -> bool:
        quiet_s = time.time() - (group.heartbeat or group.created_at)
        return group.state in _LIVING and bool(group.unheard(heard)) and quiet_s > self._patience_s

    def _end(self, group: GroupRecord, heard: set[str], now: float) -> bool:
        if now - self._silent_since[group.identifier, group.epoch] < self._patience_s:
            return False
        silent = ", ".join(group.unheard(heard))
        cause = (
            f"agent {silent} has not been heard for {self._patience_s:g} s; its ranks and "
            "their weights are taken for lost"
        )
        try:
            self._ledger.group_down(group.identifier, group.epoch, cause)
        except Fenced:
            return False
        _log.error(
            "group.lost identifier=%s epoch=%d agent=%s", group.identifier, group.epoch, silent
        )
        return True
