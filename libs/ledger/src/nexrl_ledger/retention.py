"""What finished work leaves in the records, and for how long: bounded by age and by count."""

from __future__ import annotations

import time

from nexrl_contract import names

from nexrl_ledger.scripts import Database

SPENT_KEPT = 100_000
SPENT_KEPT_S = 3600.0
GROUPS_KEPT = 1000
_AT_ONCE = 500


class Retention:
    """A result that was delivered is *due* once it has not been read for a while."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._client = db.client

    def may_sweep(self, period_s: float) -> bool:
        """Whether this caller is the one of all replicas that sweeps in this period."""
        return bool(self._client.set(names.JANITOR_KEY, "1", nx=True, px=int(period_s * 900)))

    def delivered(self, job_id: str) -> None:
        """The whole result of a job has been sent: from now on it need not be kept for long."""
        self._client.zadd(names.DELIVERED_KEY, {job_id: time.time()})

    def hold_result(self, job_id: str) -> bool:
        """Begin to read a result: the time that it is kept after a delivery begins again. False: it
        is being removed."""
        held = self._db.run("hold_result", [names.DELIVERED_KEY], job_id=job_id, now=time.time())
        return bool(held)

    def take_due_results(self, keep_s: float) -> list[str]:
        """Ids of the jobs whose results nobody has read for ``keep_s`` since their delivery; no
        reader begins any more.

        They are given again until :meth:`forget_results`, so that one who dies in between leaves
        nothing behind.
        """
        before = time.time() - keep_s
        due: list[str] = self._db.run("take_due", [names.DELIVERED_KEY], before=before)
        return due

    def forget_results(self, job_ids: list[str]) -> None:
        """These results are gone."""
        if job_ids:
            self._client.zrem(names.DELIVERED_KEY, *job_ids)

    def drop_finished(self, kept: int, at_least_s: float) -> int:
        """Drop the oldest ended jobs beyond the newest ``kept`` of all jobs; how many. Their
        results become due.

        None goes within ``at_least_s`` of its end. Their keys stay spent, in one set, for an hour
        at the least: a request that comes again after its job's record has gone is refused, never
        run.
        """
        dropped = 0
        while (excess := self._client.zcard(names.JOBS_KEY) - kept) > 0:
            gone = self._db.run(
                "drop_finished",
                [names.JOBS_KEY, names.SPENT_KEY, names.DELIVERED_KEY, names.FORGOTTEN_KEY],
                count=min(excess, _AT_ONCE),
                now=time.time(),
                before=time.time() - at_least_s,
            )
            if not gone:
                break
            dropped += gone
        self._forget_spent()
        return dropped

    def drop_destroyed(self, at_least_s: float) -> int:
        """Drop the records of the groups that were destroyed first, beyond the last
        ``GROUPS_KEPT``; how many.

        None goes within ``at_least_s`` of its end.
        """
        now = time.time()
        return int(
            self._db.run(
                "drop_destroyed",
                [names.DESTROYED_KEY],
                kept=GROUPS_KEPT,
                before=now - at_least_s,
                expired=now - names.RESULT_TTL_S,
            )
        )

    def _forget_spent(self) -> None:
        now = time.time()
        oldest = now - names.TOMBSTONE_TTL_S
        if (excess := self._client.zcard(names.SPENT_KEY) - SPENT_KEPT) > 0:
            ((_, first),) = self._client.zrange(names.SPENT_KEY, excess, excess, withscores=True)
            oldest = max(oldest, min(first, now - SPENT_KEPT_S))
        self._client.zremrangebyscore(names.SPENT_KEY, "-inf", f"({oldest}")
