"""The operation ledger: the truth about every job, group and process. RQ may lose, double or
reorder its wake-ups without harm."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import redis
from nexrl_contract import names
from nexrl_contract.errors import ServiceError
from nexrl_contract.records import GroupRecord, JobRecord, PayloadRef, encode_fields

from nexrl_ledger.connection import redis_fault
from nexrl_ledger.consumer import notify
from nexrl_ledger.groups import Checkpoints, Groups, Presence
from nexrl_ledger.retention import Retention
from nexrl_ledger.scripts import Database, Fenced

MAX_QUEUED = 64
_LISTED_JOBS = 10_000


class Ledger:
    """The jobs: submitted once, claimed in order, ended once; the other records are parts of it.

    One client serves it all, which nobody else uses. Safe to share between threads.
    """

    def __init__(self, client: redis.Redis) -> None:
        self._db = Database(client)
        self.client: Any = self._db.client
        self.groups = Groups(self._db)
        self.checkpoints = Checkpoints(self._db)
        self.agents = Presence(self._db, names.AGENTS_KEY, names.agent_key)
        self.checkpointers = Presence(self._db, names.CHECKPOINTERS_KEY, names.checkpointer_key)
        self.retention = Retention(self._db)

    def close(self) -> None:
        """End the connections."""
        self.client.close()

    def fault(self) -> str | None:
        """Why this Redis may lose what it has acknowledged; see
        :func:`nexrl_ledger.redis_fault`."""
        return redis_fault(self.client)

    def mark(self) -> str | None:
        """What :meth:`set_mark` wrote into this Redis: it tells one from another, and from itself
        after it was emptied."""
        text: str | None = self.client.get(names.LEDGER_KEY)
        return text

    def set_mark(self, text: str, *, only_new: bool) -> None:
        """Mark this Redis; with ``only_new`` unless it has a mark."""
        self.client.set(names.LEDGER_KEY, text, nx=only_new)

    # --- submitting ---

    def submit(
        self,
        job: JobRecord,
        *,
        check: Callable[[GroupRecord | None], None] = lambda group: None,
        group: GroupRecord | None = None,
    ) -> tuple[JobRecord, bool]:
        """Record ``job`` and wake its queue in one transaction; a repeated key gives ``(the first
        job, True)``.

        ``check`` sees the group's current record and may refuse by raising; ``group`` is a new
        group made together with the job. Epochs go on where a former group of that name ended.
        Raises ServiceError ``IDEMPOTENCY_MISMATCH``, ``EXPIRED``, ``TOO_MANY_QUEUED`` or what
        ``check`` raised.
        """
        group_key = names.group_key(job.identifier)
        watched = [group_key, *([names.idempotency_key(job.key)] if job.key else [])]
        sent = False
        with self.client.pipeline() as pipe:
            while True:
                try:
                    # From here on nobody else may change the group or take the key, or EXEC fails
                    # and everything is looked at again.
                    pipe.watch(*watched)
                    if sent and (written := self.job(job.id)) is not None:
                        return written, False  # redis-py reports a lost reply as a WatchError, too
                    if (first := self.replay_of(job.key, job.fingerprint)) is not None:
                        return first, True
                    fields = pipe.hgetall(group_key)  # immediate while the pipeline watches
                    former = GroupRecord.from_hash(fields) if "identifier" in fields else None
                    check(former)
                    if (queued := self.queue_length(job.queue)) >= MAX_QUEUED:
                        raise ServiceError(
                            "TOO_MANY_QUEUED",
                            f"{queued} operations wait for {job.identifier!r} already; try later",
                        )
                    job = job.model_copy(update={"order": self.client.incr(names.ORDER_KEY)})
                    if group is not None and former is not None:
                        group = group.model_copy(update={"epoch": former.epoch + 1})
                    pipe.multi()
                    self._write_new(pipe, job, group)
                    sent = True
                    pipe.execute()
                    return job, False
                except redis.WatchError:
                    continue

    def _write_new(self, pipe: Any, job: JobRecord, group: GroupRecord | None) -> None:
        if group is not None:
            pipe.delete(names.group_key(group.identifier))
            pipe.hset(names.group_key(group.identifier), mapping=group.to_hash())
            pipe.sadd(names.GROUPS_KEY, group.identifier)
            pipe.zrem(names.DESTROYED_KEY, group.identifier)
        pipe.hset(names.job_key(job.id), mapping=job.to_hash())
        pipe.zadd(names.waiting_key(job.queue), {job.id: job.order})
        pipe.zadd(names.JOBS_KEY, {job.id: job.created_at})
        pipe.zremrangebyscore(names.JOBS_KEY, "-inf", time.time() - names.TOMBSTONE_TTL_S)
        if job.key:
            pipe.set(names.idempotency_key(job.key), job.id)
        notify(pipe, self.client, job.queue, job.id)

    def replay_of(self, key: str | None, fingerprint: str) -> JobRecord | None:
        """The job that first used an idempotency key, None when the key is new or none; raises as
        :meth:`submit` does."""
        if not key:
            return None
        first_id = self.client.get(names.idempotency_key(key))
        first = self.job(first_id) if first_id is not None else None
        if first is None:
            if first_id is None and self.client.zscore(names.SPENT_KEY, key) is None:
                return None
            message = (
                f"idempotency key {key!r} was used by a job whose result has expired; use a new key"
            )
            raise ServiceError("EXPIRED", message)
        if first.fingerprint != fingerprint:
            message = (
                f"idempotency key {key!r} was used for other content; use a new key for a new "
                "request"
            )
            raise ServiceError("IDEMPOTENCY_MISMATCH", message, job_id=first.id)
        return first

    def knows_key(self, key: str) -> bool:
        """Whether a job has this idempotency key."""
        return bool(self.client.exists(names.idempotency_key(key)))

    # --- looking ---

    def job(self, job_id: str) -> JobRecord | None:
        """The record of a job, None when there is none (any more)."""
        fields = self.client.hgetall(names.job_key(job_id))
        return JobRecord.from_hash(fields) if "id" in fields else None

    def require_job(self, job_id: str) -> JobRecord:
        """The record of a job; raises ``JOB_NOT_FOUND``, or ``EXPIRED`` where the id itself says
        that it is old."""
        job = self.job(job_id)
        if job is not None:
            return job
        age = names.job_age_s(job_id)
        dropped: str = self.client.get(names.FORGOTTEN_KEY) or ""
        if age is not None and (age > names.RESULT_TTL_S or job_id <= dropped):
            message = (
                f"job {job_id} ended more than a day or very many jobs ago, and its result is gone"
            )
            raise ServiceError("EXPIRED", message, job_id=job_id)
        shown = job_id[:100]
        raise ServiceError("JOB_NOT_FOUND", f"there is no job {shown}", job_id=shown)

    def jobs(self, identifier: str | None = None, limit: int = 100) -> list[JobRecord]:
        """Newest first; at most ``limit``."""
        found: list[JobRecord] = []
        for job_id in self.client.zrevrange(names.JOBS_KEY, 0, _LISTED_JOBS):
            job = self.job(job_id)
            if job is not None and identifier in (None, job.identifier):
                found.append(job)
            if len(found) == limit:
                break
        return found

    def waiting(self, queue: str) -> list[JobRecord]:
        """The jobs of a queue that have not ended, in order."""
        jobs = (self.job(job_id) for job_id in self.client.zrange(names.waiting_key(queue), 0, -1))
        return [job for job in jobs if job is not None]

    def queue_length(self, queue: str) -> int:
        """How many jobs of a queue have not ended."""
        return int(self.client.zcard(names.waiting_key(queue)))

    def ahead_of(self, job: JobRecord) -> int:
        """How many jobs of its queue are before it."""
        return int(self.client.zrank(names.waiting_key(job.queue), job.id) or 0)

    def payloads_in_use(self) -> set[str]:
        """Ids of the payloads that jobs which have not ended still need."""
        trained = map(names.train_queue, self.groups.identifiers())
        queues = [names.AGENT_QUEUE, names.CHECKPOINT_QUEUE, *trained]
        jobs = (job for queue in queues for job in self.waiting(queue))
        return {job.payload.id for job in jobs if job.payload is not None}

    def explain_wait(self, job_id: str, reason: str) -> None:
        """Say why a queued job waits."""
        state, told = self.client.hmget(names.job_key(job_id), "state", "waits_for")
        if state == "queued" and told != reason:
            self.client.hset(names.job_key(job_id), "waits_for", reason)

    # --- running ---

    def claim(
        self,
        queue: str,
        *,
        job_id: str | None = None,
        identifier: str = "",
        epoch: int | None = None,
        stale_before: float | None = None,
        held: Iterable[str] = (),
    ) -> JobRecord | None:
        """Take a queued job: the head of ``queue``, or ``job_id``; None when there is nothing to
        take.

        A group's consumer gives its ``epoch`` and raises :class:`Fenced` when it has been replaced.
        ``stale_before`` also takes a running job whose lease is older than that time. A queued job
        of one of the ``held`` operations stays where it is.
        """
        answer = ["GONE"]
        while answer[0] == "GONE":  # the head's record had expired: take the next one
            answer = self._db.run(
                "claim",
                [names.waiting_key(queue), names.group_key(identifier)],
                now=time.time(),
                epoch=epoch,
                job_id=job_id,
                stale_before=stale_before,
                held=list(held),
            )
            if job_id:
                break
        if answer[0] == "FENCED":
            raise Fenced(f"epoch {epoch} of {identifier!r} has been replaced")
        return self.job(answer[1]) if answer[0] == "OK" else None

    def renew(self, job: JobRecord) -> None:
        """Extend the lease of a claimed job."""
        self.client.hset(names.job_key(job.id), "lease_at", str(time.time()))

    def hand_over(self, job: JobRecord, queue: str, *, epoch: int, params: dict[str, Any]) -> None:
        """Move a claimed job to another queue for its second half; its group is free for the next
        one."""
        answer = self._db.run(
            "hand_over",
            [*_keys(job), names.waiting_key(job.queue), names.waiting_key(queue)],
            job_id=job.id,
            attempt=job.attempt,
            epoch=epoch,
            queue=queue,
            order=job.order,
            fields=_flat(params=params),
        )
        if answer != "OK":
            raise Fenced(f"job {job.id} attempt {job.attempt} has been replaced")
        with self.client.pipeline() as pipe:
            notify(pipe, self.client, queue, job.id)
            pipe.execute()

    # --- ending ---

    def finish(
        self,
        job: JobRecord,
        *,
        result: dict[str, Any] | None = None,
        result_payload: PayloadRef | None = None,
        error: dict[str, Any] | None = None,
        seq: int | None = None,
        epoch: int | None = None,
    ) -> None:
        """End a claimed job, failed if there is an ``error``; ``seq`` counts it among what the
        weights contain.

        Idempotent, so it may be repeated until Redis answers; raises :class:`Fenced` when the claim
        is no longer the current one.
        """
        state = "failed" if error else "finished"
        fields = _flat(
            state=state,
            finished_at=time.time(),
            result=result,
            result_payload=result_payload.model_dump() if result_payload else None,
            error=error,
            seq=seq,
        )
        answer = self._db.run(
            "finish",
            [*_keys(job), names.applied_key(job.identifier)],
            job_id=job.id,
            attempt=job.attempt,
            epoch=epoch,
            seq=seq,
            state=state,
            fields=fields,
        )
        if answer != "OK":
            raise Fenced(f"job {job.id} attempt {job.attempt} has been replaced")

    def cancel(self, job_id: str) -> JobRecord:
        """Cancel a queued job; raises ``JOB_RUNNING`` or ``JOB_FINAL`` when it is past that."""
        job = self.require_job(job_id)
        reason = ServiceError("JOB_CANCELLED", "the job was cancelled before it ran", job_id=job_id)
        fields = _flat(state="cancelled", finished_at=time.time(), error=reason.body())
        state = self._db.run("cancel", [names.job_key(job_id)], job_id=job_id, fields=fields)
        if state == "running":
            raise ServiceError(
                "JOB_RUNNING", f"job {job_id} is running and cannot be cancelled", job_id=job_id
            )
        if state != "cancelled":
            raise ServiceError("JOB_FINAL", f"job {job_id} is {state} already", job_id=job_id)
        return job.model_copy(update={"state": "cancelled"})


def _keys(job: JobRecord) -> list[str]:
    return [names.job_key(job.id), names.group_key(job.identifier)]


def _flat(**fields: Any) -> list[str]:
    """Fields of a record as a script takes them: name, value, name, value..."""
    return [item for pair in encode_fields(fields).items() for item in pair]
