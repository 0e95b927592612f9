"""RQ as the bell: it carries a job's id and wakes a consumer; whether and when the job runs is the
ledger's word alone.

RQ's own retries, registries, callbacks, results and signal time-outs are all off: each could run a
step twice or stop one in the middle of a collective. What stays is its queue format, so RQ's tools
can look at what rings.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import redis
import rq
from nexrl_contract.names import JOB_FUNCTIONS, RESULT_TTL_S
from redis.client import Pipeline
from rq.exceptions import StopRequested
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.timeouts import BaseDeathPenalty
from rq.worker_registration import REDIS_WORKER_KEYS, WORKERS_BY_QUEUE_KEY, clean_worker_registry

IDLE_TICK_S = 1
_SOCKET_MARGIN_S = 4
_HEARTBEAT_S = 10


class ForeignBell(Exception):
    """Something in a queue that this service did not put there."""


class BellJob(Job):
    """A job hash can name only our own functions; anything else in Redis is refused before it is
    imported."""

    @property
    def func(self) -> Any:
        raise PermissionError("bell jobs are not called: the consumer runs what the ledger says")

    def job_id_argument(self) -> str:
        """The ledger's job id this bell rings for; raises ForeignBell for anything else."""
        try:
            function, args = self.func_name, self.args
        except (
            Exception
        ) as error:  # RQ's own, or whatever the serializer raises for bytes of another one
            raise ForeignBell(f"refused a job that is not a bell: {error}") from None
        if function not in JOB_FUNCTIONS or len(args) != 1 or not isinstance(args[0], str):
            raise ForeignBell(f"refused a job that is not a bell: {function!r}")
        return args[0]


class Bell:
    """Rings queues inside the caller's transaction."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def ring(self, pipeline: Pipeline, queue: str, function: str, job_id: str) -> None:
        """Add to ``pipeline`` what wakes the consumer of ``queue``; nothing is sent before the
        pipeline is executed."""
        bell = BellJob.create(
            function,
            args=(job_id,),
            id=f"{job_id}-{function.rsplit('.', 1)[-1]}",
            connection=self._client,
            serializer=JSONSerializer,
            timeout=-1,
            ttl=RESULT_TTL_S,
            origin=queue,
            description=function,
        )
        self._queue(queue).enqueue_job(bell, pipeline=pipeline)

    def _queue(self, name: str) -> rq.Queue:
        return rq.Queue(name, connection=self._client, serializer=JSONSerializer, job_class=BellJob)

    def silence(self, queue: str) -> None:
        """Delete a queue that nobody will consume again, with the bells in it and the names of its
        killed consumers."""
        doomed = self._queue(queue)
        for job_id in doomed.get_job_ids():
            self._client.delete(BellJob.key_for(job_id))
        self._client.delete(doomed.key, doomed.intermediate_queue_key)
        self._client.srem(rq.Queue.redis_queues_keys, doomed.key)
        consumers = WORKERS_BY_QUEUE_KEY % queue
        if gone := self._client.smembers(consumers):
            self._client.srem(REDIS_WORKER_KEYS, *gone)
            self._client.delete(consumers)


class _NoDeathPenalty(BaseDeathPenalty):
    """Deadlines are the supervisor's business: a signal in the middle of a collective would lose
    the group."""

    def setup_death_penalty(self) -> None:
        """Nothing to arm."""

    def cancel_death_penalty(self) -> None:
        """Nothing to disarm."""


class ResidentWorker(rq.SimpleWorker):
    """An RQ worker that keeps its model: runs in the caller's thread, never forks, never retries,
    survives Redis' absence.

    ``on_bell(job_id)`` is called for each bell and ``on_tick()`` about once a second between bells.
    Both run in the thread that called :meth:`run`, and what they raise ends :meth:`run`.
    """

    death_penalty_class = _NoDeathPenalty
    job_class = BellJob
    max_connection_wait_time = 1.0

    def __init__(
        self,
        queue: str,
        client: redis.Redis,
        *,
        name: str,
        on_bell: Callable[[str], None],
        on_tick: Callable[[], None],
    ) -> None:
        super().__init__(
            [queue],
            name=name,
            connection=client,
            serializer=JSONSerializer,
            worker_ttl=60,
            log_job_description=False,
        )
        self._on_bell = on_bell
        self._on_tick = on_tick
        self._failure: BaseException | None = None
        self._beat_at = 0.0

    @property
    def dequeue_timeout(self) -> int:
        return IDLE_TICK_S

    @property
    def connection_timeout(self) -> int:
        return IDLE_TICK_S + _SOCKET_MARGIN_S

    def run(self) -> None:
        """Consume until :meth:`stop`; raises what a callback raised."""
        base = self.name
        while not self._stop_requested:
            self.name = f"{base}-{uuid.uuid4().hex[:8]}"
            try:
                self.work(logging_level="WARNING")
            except redis.exceptions.RedisError:
                time.sleep(0.5)
                # RQ gives no tick while Redis takes no worker's name, and it may be a tick that
                # learns of a stop.
                if not self._stop_requested:
                    with contextlib.suppress(redis.exceptions.RedisError):
                        self._guarded(self._on_tick)
            if self._failure is not None:
                raise self._failure

    @property
    def stopping(self) -> bool:
        """Whether :meth:`stop` was called."""
        return self._stop_requested

    def stop(self) -> None:
        """Return from :meth:`run` after the current callback, within the idle tick."""
        self._stop_requested = True

    def execute_job(self, job: Job, queue: rq.Queue) -> None:
        """Answer one bell and remove RQ's record of it."""
        assert isinstance(job, BellJob)
        try:
            with _Heartbeat(self):
                self._guarded(lambda: self._on_bell(job.job_id_argument()))
        finally:
            pipeline = self.connection.pipeline(transaction=False)
            pipeline.lrem(queue.intermediate_queue_key, 1, job.id)
            pipeline.delete(job.key)
            pipeline.execute()

    def heartbeat(self, timeout: int | None = None, pipeline: Pipeline | None = None) -> None:
        """RQ calls this between dequeues: the idle tick, and at most every ten seconds the real
        heartbeat."""
        if pipeline is None:
            if (
                not self._stop_requested
            ):  # it would raise while Redis is away, and nobody would ever stop
                self._guarded(self._on_tick)
            if self._stop_requested:
                raise StopRequested
        if pipeline is not None or time.monotonic() - self._beat_at >= _HEARTBEAT_S:
            self._beat_at = time.monotonic()
            super().heartbeat(timeout, pipeline)

    def _guarded(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except ForeignBell as error:
            self.log.error("bell.refused %s", error)
        except redis.exceptions.RedisError:
            raise
        except BaseException as error:
            self._failure = error
            self._stop_requested = True

    def check_for_suspension(self, burst: bool) -> None:
        """RQ's suspension switch is not ours."""

    def subscribe(self) -> None:
        """No commands over pub/sub: anyone who reaches Redis could send them."""

    def unsubscribe(self) -> None:
        """See :meth:`subscribe`."""

    def run_maintenance_tasks(self) -> None:
        """RQ must not fail or requeue anything: the ledger decides. Only the names of consumers
        that died are dropped."""
        for queue in self.queues:
            clean_worker_registry(queue)
        self.last_cleaned_at = rq.utils.now()  # type: ignore[assignment] # RQ annotates only its initial None

    def set_state(self, state: str, pipeline: Pipeline | None = None) -> None:
        """Kept in memory: the ledger says who runs what, and two round trips a job are saved."""
        self._state = state

    def procline(self, message: str) -> None:
        """The command line stays as the operator started it."""

    def _install_signal_handlers(self) -> None:
        """The entry point owns the signals."""


class _Heartbeat:
    """Keeps the worker's RQ key alive from a thread while a callback runs."""

    def __init__(self, worker: ResidentWorker) -> None:
        self._worker = worker
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def _beat(self) -> None:
        while not self._done.wait(_HEARTBEAT_S):
            try:
                self._worker.connection.expire(self._worker.key, self._worker.worker_ttl + 60)
            except redis.exceptions.RedisError:
                continue
