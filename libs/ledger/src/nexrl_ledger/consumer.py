"""RQ carries the wake-ups of consumers; whether and when a job runs is the ledger's word alone.

A wake-up that is lost costs a second, one that comes twice costs nothing. RQ's own retries,
registries, callbacks, results and signal time-outs are all off: each could run a step twice or stop
one in the middle of a collective. What stays is its queue format, so RQ's tools can look at it.

This is the one module that imports RQ and leans on parts that RQ does not document;
``tests/ledger/test_rq_contract.py`` says which.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import redis
import rq
from nexrl_contract.names import AGENT_QUEUE, CHECKPOINT_QUEUE, RESULT_TTL_S
from redis.client import Pipeline
from rq.exceptions import StopRequested
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.timeouts import BaseDeathPenalty
from rq.worker_registration import REDIS_WORKER_KEYS, WORKERS_BY_QUEUE_KEY, clean_worker_registry

from nexrl_ledger.connection import connect, until_redis

IDLE_TICK_S = 1
_SOCKET_MARGIN_S = 4
_HEARTBEAT_S = 10
# What RQ calls a job's function. These name no code: nobody imports what a job hash says.
_FUNCTIONS = {AGENT_QUEUE: "nexrl.place", CHECKPOINT_QUEUE: "nexrl.publish"}
_RUN = "nexrl.run"
Answer = TypeVar("Answer")


class WakeUp(Job):
    """RQ's record of a wake-up. Nothing in it is ever read, imported or called."""

    @property
    def func(self) -> Any:
        raise PermissionError("wake-ups are not called: the consumer runs what the ledger says")


def notify(pipeline: Pipeline, client: redis.Redis, queue: str, job_id: str) -> None:
    """Add to ``pipeline`` what wakes the consumer of ``queue``; sent when the pipeline executes."""
    function = _FUNCTIONS.get(queue, _RUN)
    wake_up = WakeUp.create(
        function,
        args=(job_id,),
        id=f"{job_id}-{function.rpartition('.')[2]}",
        connection=client,
        serializer=JSONSerializer,
        timeout=-1,
        ttl=RESULT_TTL_S,
        origin=queue,
        description=function,
    )
    _rq_queue(client, queue).enqueue_job(wake_up, pipeline=pipeline)


def drop_queue(client: redis.Redis, queue: str) -> None:
    """Delete a queue that nobody will consume again, its wake-ups and the names of its killed
    consumers."""
    doomed = _rq_queue(client, queue)
    for job_id in doomed.get_job_ids():
        client.delete(WakeUp.key_for(job_id))
    client.delete(doomed.key, doomed.intermediate_queue_key)
    client.srem(rq.Queue.redis_queues_keys, doomed.key)
    consumers = WORKERS_BY_QUEUE_KEY % queue
    if gone := client.smembers(consumers):
        client.srem(REDIS_WORKER_KEYS, *gone)
        client.delete(consumers)


def _rq_queue(client: redis.Redis, name: str) -> rq.Queue:
    return rq.Queue(name, connection=client, serializer=JSONSerializer, job_class=WakeUp)


class QueueConsumer:
    """Calls ``on_wake()`` for each wake-up of ``queue``, and about once a second without one.

    ``on_wake`` runs in the thread that called :meth:`run`; what it raises ends :meth:`run`, except
    for RedisError.
    """

    def __init__(
        self, redis_url: str, queue: str, *, name: str, on_wake: Callable[[], None]
    ) -> None:
        self._client = connect(redis_url, decode=False, timeout_s=None)
        self._queue = queue
        self._name = name
        self._on_wake = on_wake
        self._failure: BaseException | None = None
        self.stopping = False
        """Whether :meth:`stop` was called."""

    def run(self) -> None:
        """Consume until :meth:`stop`, wherever Redis goes meanwhile; raises what ``on_wake``
        raised."""
        while not self.stopping:
            try:
                # A new name each time: RQ refuses one whose last owner has not signed off.
                _Worker(self, f"{self._name}-{uuid.uuid4().hex[:8]}").work(logging_level="WARNING")
            except redis.exceptions.RedisError:
                # RQ calls nothing while Redis takes no worker's name, and it may be this call that
                # learns of a stop.
                with contextlib.suppress(redis.exceptions.RedisError):
                    self.wake()
            if not self.stopping:  # Redis is away, or refuses what RQ or on_wake wants of it
                time.sleep(0.5)
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Let :meth:`run` return after the current ``on_wake``, within a second."""
        self.stopping = True

    def until_redis(self, act: Callable[[], Answer]) -> Answer:
        """Repeat an *idempotent* ``act`` while Redis is away; raises SystemExit(0) where
        :meth:`stop` was called meanwhile."""
        return until_redis(act, while_waiting=self._leave_if_stopping)

    def _leave_if_stopping(self) -> None:
        if self.stopping:
            raise SystemExit(0)

    def wake(self) -> None:
        """Call ``on_wake`` unless stopping; only RedisError comes out of here."""
        if self.stopping:
            return
        try:
            self._on_wake()
        except redis.exceptions.RedisError:
            raise
        except BaseException as error:  # RQ would log it and go on
            self._failure = error
            self.stopping = True


class _NoDeathPenalty(BaseDeathPenalty):
    """No time-out by a signal: in the middle of a collective it would lose the group."""

    def setup_death_penalty(self) -> None:
        """Nothing to arm."""

    def cancel_death_penalty(self) -> None:
        """Nothing to disarm."""


class _Worker(rq.SimpleWorker):
    """An RQ worker that runs in the caller's thread: never forks, never retries, takes no
    commands."""

    death_penalty_class = _NoDeathPenalty
    job_class = WakeUp
    max_connection_wait_time = 1.0

    def __init__(self, consumer: QueueConsumer, name: str) -> None:
        super().__init__(
            [consumer._queue],
            name=name,
            connection=consumer._client,
            serializer=JSONSerializer,
            worker_ttl=60,
            log_job_description=False,
        )
        self._consumer = consumer
        self._beat_at = 0.0

    @property
    def dequeue_timeout(self) -> int:
        return IDLE_TICK_S

    @property
    def connection_timeout(self) -> int:
        return IDLE_TICK_S + _SOCKET_MARGIN_S

    def execute_job(self, job: Job, queue: rq.Queue) -> None:
        """Answer one wake-up and remove RQ's record of it."""
        try:
            with self._kept_alive():
                self._consumer.wake()
        finally:
            pipeline = self.connection.pipeline(transaction=False)
            pipeline.lrem(queue.intermediate_queue_key, 1, job.id)
            pipeline.delete(job.key)
            pipeline.execute()

    def heartbeat(self, timeout: int | None = None, pipeline: Pipeline | None = None) -> None:
        """RQ calls this between dequeues: the idle tick, and at most every ten seconds the real
        heartbeat."""
        if pipeline is None:
            self._consumer.wake()
            if self._consumer.stopping:
                raise StopRequested
        if pipeline is not None or time.monotonic() - self._beat_at >= _HEARTBEAT_S:
            self._beat_at = time.monotonic()
            super().heartbeat(timeout, pipeline)

    @contextlib.contextmanager
    def _kept_alive(self) -> Iterator[None]:
        """RQ's key of this worker does not expire inside the block, however long that takes."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(_HEARTBEAT_S):
                with contextlib.suppress(redis.exceptions.RedisError):
                    self.connection.expire(self.key, self.worker_ttl + 60)

        threading.Thread(target=beat, daemon=True).start()
        try:
            yield
        finally:
            done.set()

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
