"""What one gateway process works with, made at start-up and passed to whatever needs it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Self

import redis
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import Depends, Request
from nexrl_contract.records import JobRecord
from nexrl_ledger import Ledger, connect, follow_ended
from nexrl_payloads import PayloadStore, open_store

from nexrl_gateway.paths import Roots
from nexrl_gateway.settings import Settings
from nexrl_gateway.upkeep import Watch

REREAD_S = 1.0
_PATIENCE_S = 2.0
_LISTEN_S = 0.5


@dataclass(frozen=True, slots=True)
class Room:
    """What one process does at a time of what takes memory, or the interpreter, from everybody
    else."""

    small_bodies: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(32))
    large_bodies: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))
    parsing: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(1))
    looking: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(4))
    """Threads of their own for /health, which must answer when all others are taken."""


class CompletionWaiter:
    """Wakes whoever waits for a job to end. One subscription per process wakes everybody; a re-read
    each second covers lost messages and Redis' absence. Made in the event loop that uses it."""

    def __init__(self, ledger: Ledger, redis_url: str) -> None:
        self._ledger = ledger
        self._loop = asyncio.get_running_loop()
        self._events: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=follow_ended,
            args=(redis_url, self._stopping),
            kwargs={
                "on_ended": lambda job_id: self._in_loop(partial(self._wake, job_id)),
                "on_gap": lambda: self._in_loop(self._wake_all),
            },
            name="completions",
            daemon=True,
        )
        self._thread.start()

    async def final(self, job_id: str, timeout_s: float) -> JobRecord:
        """The job's record when it has ended, or as it is after ``timeout_s`` or when the gateway
        stops.

        Raises JOB_NOT_FOUND or EXPIRED, and Redis' own errors once Redis has been away for two
        seconds.
        """
        deadline = time.monotonic() + timeout_s
        answered = time.monotonic()
        with self._registered(job_id) as event:
            while True:
                event.clear()  # before the read: a job that ends after the read sets it again
                try:
                    job = await run_sync(self._ledger.require_job, job_id)
                except redis.exceptions.RedisError:
                    if time.monotonic() - answered > _PATIENCE_S:
                        raise
                    await asyncio.sleep(_LISTEN_S)
                    continue
                left = deadline - time.monotonic()
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
        for job_id in self._events:
            self._wake(job_id)

    def _in_loop(self, act: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
            self._loop.call_soon_threadsafe(act)


@dataclass(frozen=True, slots=True)
class Services:
    """Everything that a request may touch. ``started_at`` is seconds since the epoch."""

    settings: Settings
    ledger: Ledger
    store: PayloadStore
    completions: CompletionWaiter
    watch: Watch
    roots: Roots
    room: Room = field(default_factory=Room)
    started_at: float = field(default_factory=time.time)

    @classmethod
    def start(cls, settings: Settings) -> Self:
        """Needs a running event loop, not Redis. Raises STORE_UNAVAILABLE for a folder that cannot
        be made."""
        ledger = Ledger(connect(settings.redis_url))
        return cls(
            settings=settings,
            ledger=ledger,
            watch=Watch(ledger, settings.own_folder),
            store=open_store(settings.payloads, fsync=settings.fsync),
            completions=CompletionWaiter(ledger, settings.redis_url),
            roots=Roots.of(settings),
        )

    async def close(self) -> None:
        """End the waits and the connections."""
        await self.completions.close()
        self.ledger.close()


def services_of(request: Request) -> Services:
    """The services of the app that got ``request``; a FastAPI dependency."""
    services: Services = request.app.state.services
    return services


Here = Annotated[Services, Depends(services_of)]
