"""Takes away payloads that nobody needs any more, of all replicas one at a time; and ends groups that nobody has any more."""

from __future__ import annotations

import asyncio
import logging

import redis
from anyio.to_thread import run_sync
from nexrl_contract.errors import ServiceError
from nexrl_contract.names import JANITOR_KEY, RESULT_TTL_S

from nexrl_gateway.lost_groups import LostGroups
from nexrl_gateway.services import Services

PERIOD_S = 60
UPLOAD_AGE_S = 3600.0
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
        await asyncio.sleep(PERIOD_S)


def sweep(services: Services) -> list[str]:
    """One sweep, unless another replica has just made one; the ids of what was removed."""
    if not services.ledger.client.set(JANITOR_KEY, "1", nx=True, ex=PERIOD_S - 5):
        return []
    in_use = services.ledger.payloads_in_use()
    removed = services.store.sweep(in_use, result_age_s=RESULT_TTL_S, upload_age_s=UPLOAD_AGE_S)
    if removed:
        _log.info("janitor.swept count=%d", len(removed))
    return removed
