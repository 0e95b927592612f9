"""Waiting for jobs to end: one subscription per process wakes everybody, a slow re-read covers lost
messages."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial

import redis
from anyio.to_thread import run_sync
from nexrl_contract.names import ENDED_CHANNEL
from nexrl_contract.records import JobRecord
from nexrl_ledger import Ledger, connect

REREAD_S = 1.0
_PATIENCE_S = 2.0
_LISTEN_S = 0.5


class Endings:
    """Wakes whoever waits for a job; made in the event loop that uses it. Survives Redis'
    absence."""

    def __init__(self, redis_url: str) -> None:
        self._redis_url = redis_url
        self._loop = asyncio.get_running_loop()
        self._events: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="endings", daemon=True)
        self._thread.start()

    async def final(self, ledger: Ledger, job_id: str, timeout_s: float) -> JobRecord:
        """The job's record when it has ended, or as it is after ``timeout_s`` or when the gateway
        stops.

        Raises JOB_NOT_FOUND or EXPIRED, and Redis' own errors once Redis has been away for two
        seconds.
        """
        deadline = time.monotonic() + timeout_s
        answered = time.monotonic()
        with self._registered(job_id) as event:
            while True:
                event.clear()
                try:
                    job = await run_sync(ledger.require_job, job_id)
                except redis.exceptions.RedisError:
                    if time.monotonic() - answered > _PATIENCE_S:
                        raise
                    await asyncio.sleep(_LISTEN_S)
                    continue
                answered = time.monotonic()
                left = deadline - answered
                if job.final or left <= 0 or self._stopping.is_set():
                    return job
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(REREAD_S, left)):
                        await event.wait()
                answered = time.monotonic()

    def stop(self) -> None:
        """Answer everybody now, with the jobs as they are."""
        self._stopping.set()
        self._in_loop(self._wake_all)

    async def close(self) -> None:
        """Stop, and end the subscription."""
        self.stop()
        await run_sync(self._thread.join)

    @contextlib.contextmanager
    def _registered(self, job_id: str) -> Iterator[asyncio.Event]:
        event = asyncio.Event()
        self._events[job_id].add(event)
        try:
            yield event
        finally:
            self._events[job_id].discard(event)
            if not self._events[job_id]:
                del self._events[job_id]

    def _wake(self, job_id: str) -> None:
        for event in self._events.get(job_id, ()):
            event.set()

    def _wake_all(self) -> None:
        for events in self._events.values():
            for event in events:
                event.set()

    def _listen(self) -> None:
        client = connect(self._redis_url)
        while not self._stopping.is_set():
            try:
                with client.pubsub(ignore_subscribe_messages=True) as channel:  # type: ignore[no-untyped-call]
                    channel.subscribe(ENDED_CHANNEL)
                    self._in_loop(self._wake_all)
                    self._relay(channel)
            except redis.exceptions.RedisError:
                self._stopping.wait(_LISTEN_S)
        client.close()

    def _relay(self, channel: redis.client.PubSub) -> None:
        while not self._stopping.is_set():
            message = channel.get_message(timeout=_LISTEN_S)
            if message is not None:
                job_id: str = message["data"]
                self._in_loop(partial(self._wake, job_id))

    def _in_loop(self, act: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
            self._loop.call_soon_threadsafe(act)
