"""What finished work leaves in the records, and for how long: bounded by age and by count."""

from __future__ import annotations

import time

from nexrl_contract import names

from nexrl_ledger.base import LedgerPart

SPENT_KEPT = 100_000
SPENT_KEPT_S = 3600.0
GROUPS_KEPT = 1000
_AT_ONCE = 500


class Retention(LedgerPart):
    """See :class:`nexrl_ledger.Ledger`. A result that was delivered is *due* once it has not been
    read for a while."""

    def may_sweep(self, period_s: float) -> bool:
        """Whether this caller is the one of all replicas that sweeps in this period."""
        return bool(self.client.set(names.JANITOR_KEY, "1", nx=True, px=int(period_s * 900)))

    def delivered(self, job_id: str) -> None:
        """The whole result of a job has been sent: from now on it need not be kept for long."""
        self.client.zadd(names.DELIVERED_KEY, {job_id: time.time()})

    def hold_result(self, job_id: str) -> bool:
        """Begin to read a result: the time that it is kept after a delivery begins again. False: it
        is being removed."""
        return bool(
            self._script["hold_result"](keys=[names.DELIVERED_KEY], args=[job_id, time.time()])
        )

    def take_due_results(self, keep_s: float) -> list[str]:
        """Ids of the jobs whose results nobody has read for ``keep_s`` since their delivery; no
        reader begins any more.

        They are given again until :meth:`forget_results`, so that one who dies in between leaves
        nothing behind.
        """
        due: list[str] = self._script["take_due"](
            keys=[names.DELIVERED_KEY], args=[time.time() - keep_s]
        )
        return due

    def forget_results(self, job_ids: list[str]) -> None:
        """These results are gone."""
        if job_ids:
            self.client.zrem(names.DELIVERED_KEY, *job_ids)

    def drop_finished(self, kept: int, at_least_s: float) -> int:
        """Drop the oldest ended jobs beyond the newest ``kept`` of all jobs; how many. Their
        results become due.

        None goes within ``at_least_s`` of its end. Their keys stay spent, in one set, for an hour
        at the least: a request that comes again after its job's record has gone is refused, never
        run.
        """
        dropped = 0
        while (excess := self.client.zcard(names.JOBS_KEY) - kept) > 0:
            gone = self._script["drop_finished"](
                keys=[names.JOBS_KEY, names.SPENT_KEY, names.DELIVERED_KEY, names.FORGOTTEN_KEY],
                args=[min(excess, _AT_ONCE), time.time(), time.time() - at_least_s],
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
            self._script["drop_destroyed"](
                keys=[names.DESTROYED_KEY],
                args=[GROUPS_KEPT, now - at_least_s, now - names.RESULT_TTL_S],
            )
        )

    def _forget_spent(self) -> None:
        now = time.time()
        oldest = now - names.TOMBSTONE_TTL_S
        if (excess := self.client.zcard(names.SPENT_KEY) - SPENT_KEPT) > 0:
            ((_, first),) = self.client.zrange(names.SPENT_KEY, excess, excess, withscores=True)
            oldest = max(oldest, min(first, now - SPENT_KEPT_S))
        self.client.zremrangebyscore(names.SPENT_KEY, "-inf", f"({oldest}")
