"""The operation ledger: the truth about every job, group and agent. RQ may lose, double or reorder its bells without harm."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from typing import Any

import redis
from nexrl_contract import names
from nexrl_contract.errors import ServiceError
from nexrl_contract.records import AgentRecord, GroupRecord, JobRecord, PayloadRef, encode_fields

from nexrl_ledger import scripts
from nexrl_ledger.bell import Bell

MAX_QUEUED = 64
AGENT_TTL_S = 15
_LISTED_JOBS = 10_000


class Fenced(Exception):
    """The caller's epoch or attempt is no longer the current one: what it wanted to write is not history."""


class Ledger:
    """Reads and atomic changes of the records; safe to share between threads."""

    def __init__(self, client: redis.Redis) -> None:
        # redis-py types replies as decoded or raw, single or nested; this client always decodes.
        self.client: Any = client
        self.bell = Bell(client)
        ttls = {"RESULT_TTL": names.RESULT_TTL_S, "TOMBSTONE_TTL": names.TOMBSTONE_TTL_S}
        self._script = {name: client.register_script(_with_constants(text, ttls)) for name, text in _SCRIPTS.items()}

    # --- jobs ---

    def submit(
        self,
        job: JobRecord,
        function: str,
        *,
        check: Callable[[GroupRecord | None], None] = lambda group: None,
        group: GroupRecord | None = None,
    ) -> tuple[JobRecord, bool]:
        """Record ``job`` and ring its queue in one transaction; a repeated key gives ``(the first job, True)``.

        ``check`` sees the group's current record and may refuse by raising; ``group`` is a new group made together with the job.
        Raises ServiceError ``IDEMPOTENCY_MISMATCH``, ``EXPIRED``, ``TOO_MANY_QUEUED`` or what ``check`` raised.
        """
        group_key = names.group_key(job.identifier)
        key = names.idempotency_key(job.key) if job.key else None
        with self.client.pipeline() as pipe:
            while True:
                try:
                    pipe.watch(group_key, *([key] if key else []))
                    if key and (first := pipe.get(key)) is not None:
                        return self._replayed(job, str(first)), True
                    check(self._group_in(pipe, group_key))
                    if (queued := pipe.zcard(names.waiting_key(job.queue))) >= MAX_QUEUED:
                        raise ServiceError(
                            "TOO_MANY_QUEUED", f"{queued} operations wait for {job.identifier!r} already; try later"
                        )
                    job = job.model_copy(update={"order": pipe.incr(names.ORDER_KEY)})
                    pipe.multi()
                    self._write_new(pipe, job, key, function, group)
                    pipe.execute()
                    return job, False
                except redis.WatchError:
                    continue

    def _replayed(self, job: JobRecord, first_id: str) -> JobRecord:
        first = self.job(first_id)
        if first is None:
            raise ServiceError(
                "EXPIRED", f"idempotency key {job.key!r} was used by a job whose result has expired; use a new key"
            )
        if first.fingerprint != job.fingerprint:
            raise ServiceError(
                "IDEMPOTENCY_MISMATCH",
                f"idempotency key {job.key!r} was used for other content; use a new key for a new request",
                job_id=first.id,
            )
        return first

    def _write_new(self, pipe: Any, job: JobRecord, key: str | None, function: str, group: GroupRecord | None) -> None:
        if group is not None:
            pipe.delete(names.group_key(group.identifier))
            pipe.hset(names.group_key(group.identifier), mapping=group.to_hash())
            pipe.sadd(names.GROUPS_KEY, group.identifier)
        pipe.hset(names.job_key(job.id), mapping=job.to_hash())
        pipe.zadd(names.waiting_key(job.queue), {job.id: job.order})
        pipe.zadd(names.JOBS_KEY, {job.id: job.created_at})
        pipe.zremrangebyscore(names.JOBS_KEY, "-inf", time.time() - names.TOMBSTONE_TTL_S)
        if key:
            pipe.set(key, job.id)
        self.bell.ring(pipe, job.queue, function, job.id)

    def replay_of(self, key: str, fingerprint: str) -> JobRecord | None:
        """The job that first used an idempotency key, None when the key is new; raises as :meth:`submit` does."""
        first = self.client.get(names.idempotency_key(key))
        if first is None:
            return None
        return self._replayed(
            JobRecord(id="", operation="", identifier="", queue="", key=key, fingerprint=fingerprint), str(first)
        )

    def job(self, job_id: str) -> JobRecord | None:
        """The record of a job, None when there is none (any more)."""
        fields = self.client.hgetall(names.job_key(job_id))
        return JobRecord.from_hash(fields) if "id" in fields else None

    def require_job(self, job_id: str) -> JobRecord:
        """The record of a job; raises ``JOB_NOT_FOUND``, or ``EXPIRED`` where the id itself says that it is old."""
        job = self.job(job_id)
        if job is not None:
            return job
        age = names.job_age_s(job_id)
        if age is not None and age > names.RESULT_TTL_S:
            raise ServiceError(
                "EXPIRED", f"job {job_id} ended more than a day ago and its result is gone", job_id=job_id
            )
        raise ServiceError("JOB_NOT_FOUND", f"there is no job {job_id}", job_id=job_id)

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

    def claim(
        self,
        queue: str,
        *,
        job_id: str = "",
        identifier: str = "",
        epoch: int | None = None,
        stale_before: float | None = None,
    ) -> JobRecord | None:
        """Take a queued job: the head of ``queue``, or ``job_id``; None when there is nothing to take.

        A group's consumer gives its ``epoch`` and raises :class:`Fenced` when it has been replaced. ``stale_before`` also takes a
        running job whose lease is older than that time.
        """
        while True:
            answer = self._script["claim"](
                keys=[names.waiting_key(queue), names.group_key(identifier)],
                args=[time.time(), _text(epoch), job_id, _text(stale_before)],
            )
            if answer[0] == "FENCED":
                raise Fenced(f"epoch {epoch} of {identifier!r} has been replaced")
            if answer[0] == "GONE" and not job_id:
                continue
            return self.job(answer[1]) if answer[0] == "OK" else None

    def renew(self, job: JobRecord) -> None:
        """Extend the lease of a claimed job."""
        self.client.hset(names.job_key(job.id), "lease_at", str(time.time()))

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
        """End a claimed job, failed if there is an ``error``; ``seq`` counts it among what the weights contain.

        Idempotent, so it may be repeated until Redis answers; raises :class:`Fenced` when the claim is no longer the current one.
        """
        fields = encode_fields(
            {
                "state": "failed" if error else "finished",
                "finished_at": time.time(),
                "result": result,
                "result_payload": result_payload.model_dump() if result_payload else None,
                "error": error,
                "seq": seq,
            }
        )
        flat = [item for pair in fields.items() for item in pair]
        answer = self._script["finish"](
            keys=[names.job_key(job.id), names.group_key(job.identifier), names.applied_key(job.identifier)],
            args=[job.id, job.attempt, _text(epoch), _text(seq), *flat],
        )
        if answer != "OK":
            raise Fenced(f"job {job.id} attempt {job.attempt} has been replaced")

    def cancel(self, job_id: str) -> JobRecord:
        """Cancel a queued job; raises ``JOB_RUNNING`` or ``JOB_FINAL`` when it is past that."""
        job = self.require_job(job_id)
        fields = encode_fields(
            {
                "state": "cancelled",
                "finished_at": time.time(),
                "error": ServiceError("JOB_CANCELLED", "the job was cancelled before it ran", job_id=job_id).body(),
            }
        )
        state = self._script["cancel"](
            keys=[names.job_key(job_id)], args=[job_id, *(x for pair in fields.items() for x in pair)]
        )
        if state == "running":
            raise ServiceError("JOB_RUNNING", f"job {job_id} is running and cannot be cancelled", job_id=job_id)
        if state != "cancelled":
            raise ServiceError("JOB_FINAL", f"job {job_id} is {state} already", job_id=job_id)
        return job.model_copy(update={"state": "cancelled"})

    def hand_over(self, job: JobRecord, queue: str, function: str, *, epoch: int, params: dict[str, Any]) -> None:
        """Move a claimed job to another queue for its second half; its group is free for the next one."""
        flat = [item for pair in encode_fields({"params": params}).items() for item in pair]
        answer = self._script["hand_over"](
            keys=[
                names.job_key(job.id),
                names.group_key(job.identifier),
                names.waiting_key(job.queue),
                names.waiting_key(queue),
            ],
            args=[job.id, job.attempt, epoch, queue, job.order, *flat],
        )
        if answer != "OK":
            raise Fenced(f"job {job.id} attempt {job.attempt} has been replaced")
        with self.client.pipeline() as pipe:
            self.bell.ring(pipe, queue, function, job.id)
            pipe.execute()

    def explain_wait(self, job_id: str, reason: str) -> None:
        """Say why a queued job waits."""
        if self.client.hget(names.job_key(job_id), "state") == "queued":
            self.client.hset(names.job_key(job_id), "waits_for", reason)

    def payloads_in_use(self) -> set[str]:
        """Ids of the payloads that jobs which have not ended still need."""
        queues = [names.AGENT_QUEUE, names.CHECKPOINT_QUEUE, *(names.train_queue(name) for name in self.identifiers())]
        return {job.payload.id for queue in queues for job in self.waiting(queue) if job.payload is not None}

    # --- groups ---

    def identifiers(self) -> list[str]:
        """Names of the living groups, sorted."""
        return sorted(self.client.smembers(names.GROUPS_KEY))

    def group(self, identifier: str) -> GroupRecord | None:
        """The record of a group, None when it is unknown; a destroyed one is kept for a day."""
        fields = self.client.hgetall(names.group_key(identifier))
        return GroupRecord.from_hash(fields) if "identifier" in fields else None

    def groups(self) -> list[GroupRecord]:
        """All living groups, by name."""
        return [group for name in self.identifiers() if (group := self.group(name)) is not None]

    def update_group(self, identifier: str, epoch: int | None = None, **fields: Any) -> None:
        """Set fields of a group (None deletes one); raises :class:`Fenced` when ``epoch`` is not the current one."""
        encoded = encode_fields(fields)
        flat = [item for name in fields for item in (name, encoded.get(name, ""))]
        if self._script["update_group"](keys=[names.group_key(identifier)], args=[_text(epoch), *flat]) != "OK":
            raise Fenced(f"epoch {epoch} of {identifier!r} has been replaced")

    def start_epoch(self, identifier: str, agent: str, nodes: list[str]) -> int:
        """Begin a new incarnation of a group on ``agent``; raises :class:`Fenced` when the group is gone."""
        epoch = int(
            self._script["start_epoch"](
                keys=[names.group_key(identifier)], args=[agent, json.dumps(nodes), time.time()]
            )
        )
        if epoch < 0:
            raise Fenced(f"group {identifier!r} is gone")
        return epoch

    def group_down(self, identifier: str, epoch: int | None, cause: str, *, rank: int | None = None) -> None:
        """The group has failed: state ``down`` with its cause, and every job that waits for it fails."""
        running = ServiceError(
            "OPERATION_FAILED", f"the group went down while it ran this: {cause}", identifier=identifier, rank=rank
        )
        queued = ServiceError("GROUP_DOWN", f"the group went down before it ran this: {cause}", identifier=identifier)
        self._end_group(identifier, epoch, "down", cause, "", running, queued, None)

    def group_destroyed(self, identifier: str, epoch: int | None, *, spare_job: str = "") -> None:
        """The group is gone; its record stays for a day, jobs that still wait fail, ``spare_job`` is left to its caller."""
        error = ServiceError("GROUP_NOT_READY", "the group was destroyed before it ran this", identifier=identifier)
        self._end_group(identifier, epoch, "destroyed", "", spare_job, error, error, names.RESULT_TTL_S)
        self.bell.silence(names.train_queue(identifier))

    def _end_group(
        self,
        identifier: str,
        epoch: int | None,
        state: str,
        cause: str,
        spare_job: str,
        running: ServiceError,
        queued: ServiceError,
        ttl_s: int | None,
    ) -> None:
        answer = self._script["end_group"](
            keys=[
                names.group_key(identifier),
                names.waiting_key(names.train_queue(identifier)),
                names.applied_key(identifier),
            ],
            args=[
                _text(epoch),
                state,
                cause,
                spare_job,
                time.time(),
                json.dumps(running.body()),
                json.dumps(queued.body()),
                _text(ttl_s),
            ],
        )
        if answer != "OK":
            raise Fenced(f"epoch {epoch} of {identifier!r} has been replaced")

    def roll_back(self, identifier: str, epoch: int, seq: int) -> int:
        """Mark what was applied after ``seq`` as rolled back and set the group's ``seq``; returns how many jobs that were."""
        count = int(
            self._script["roll_back"](
                keys=[names.group_key(identifier), names.applied_key(identifier)],
                args=[epoch, seq],
            )
        )
        if count < 0:
            raise Fenced(f"epoch {epoch} of {identifier!r} has been replaced")
        return count

    def _group_in(self, pipe: Any, key: str) -> GroupRecord | None:
        fields = pipe.hgetall(key)  # immediate while the pipeline watches
        return GroupRecord.from_hash(fields) if "identifier" in fields else None

    # --- agents and checkpointers ---

    def beat(self, record: AgentRecord, *, checkpointer: bool = False) -> None:
        """Register a process and its state for the next seconds."""
        key = names.checkpointer_key(record.name) if checkpointer else names.agent_key(record.name)
        with self.client.pipeline() as pipe:
            pipe.sadd(names.CHECKPOINTERS_KEY if checkpointer else names.AGENTS_KEY, record.name)
            pipe.hset(key, mapping=record.model_copy(update={"heartbeat": time.time()}).to_hash())
            pipe.expire(key, AGENT_TTL_S)
            pipe.execute()

    def sign_off(self, name: str, *, checkpointer: bool = False) -> None:
        """Forget a process that stops."""
        self.client.srem(names.CHECKPOINTERS_KEY if checkpointer else names.AGENTS_KEY, name)
        self.client.delete(names.checkpointer_key(name) if checkpointer else names.agent_key(name))

    def agents(self) -> list[AgentRecord]:
        """Agents heard of in the last seconds, by name."""
        return self._alive(names.AGENTS_KEY, names.agent_key)

    def checkpointers(self) -> list[AgentRecord]:
        """Checkpointers heard of in the last seconds, by name."""
        return self._alive(names.CHECKPOINTERS_KEY, names.checkpointer_key)

    def _alive(self, index: str, key_of: Callable[[str], str]) -> list[AgentRecord]:
        found = []
        members: Iterable[str] = self.client.smembers(index)
        for name in sorted(members):
            fields = self.client.hgetall(key_of(name))
            if fields:
                found.append(AgentRecord.from_hash(fields))
            else:
                self.client.srem(index, name)
        return found


_SCRIPTS = {
    "claim": scripts.CLAIM,
    "finish": scripts.FINISH,
    "cancel": scripts.CANCEL,
    "hand_over": scripts.HAND_OVER,
    "update_group": scripts.UPDATE_GROUP,
    "start_epoch": scripts.START_EPOCH,
    "end_group": scripts.END_GROUP,
    "roll_back": scripts.ROLL_BACK,
}


def _with_constants(text: str, constants: dict[str, int]) -> str:
    for name, value in constants.items():
        text = text.replace(name, str(value))
    return text


def _text(value: object | None) -> str:
    return "" if value is None else str(value)
