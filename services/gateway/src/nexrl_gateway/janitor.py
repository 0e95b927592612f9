"""Takes away payloads and records that nobody needs any more, of all replicas one at a time; and ends lost groups."""

from __future__ import annotations

import asyncio
import logging

import redis
from anyio.to_thread import run_sync
from nexrl_contract.errors import ServiceError
from nexrl_contract.names import RESULT_TTL_S
from nexrl_payloads import RESULT_SUFFIX

from nexrl_gateway.lost_groups import LostGroups
from nexrl_gateway.services import Services

PERIOD_S = 60.0
_log = logging.getLogger(__name__)


async def keep_clean(services: Services) -> None:
    """Sweep once a period until cancelled; a store or Redis that is away is tried again the next time."""
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
    removed = services.store.sweep(in_use, result_age_s=RESULT_TTL_S, upload_age_s=settings.upload_kept_s)
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
    return min(PERIOD_S, settings.result_kept_s / 2, settings.upload_kept_s / 2, settings.jobs_kept_s / 2)
