"""What the groups run at the moment, for whoever waits for its end."""

from __future__ import annotations

import time
from collections.abc import Callable

import redis
from nexrl_ledger import Ledger, connect


def running_operations(redis_url: str) -> Callable[[], str]:
    """A look at the ledger: ``student: update_actor, 83 s so far``, empty where nothing runs or
    Redis is away."""
    ledger = Ledger(connect(redis_url))

    def look() -> str:
        try:
            groups = [group for group in ledger.groups.living() if group.running_job is not None]
            jobs = [ledger.job(str(group.running_job)) for group in groups]
        except redis.exceptions.RedisError:
            return ""
        now = time.time()
        return "; ".join(
            f"{job.identifier}: {job.operation}, {now - (job.started_at or now):.0f} s so far"
            for job in jobs
            if job is not None
        )

    return look
