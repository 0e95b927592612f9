"""What one gateway process works with, made at start-up and passed to whatever needs it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Self

from anyio import CapacityLimiter
from fastapi import Request
from nexrl_ledger import Ledger, connect
from nexrl_payloads import PayloadStore, open_store

from nexrl_gateway.paths import Roots
from nexrl_gateway.settings import Settings
from nexrl_gateway.waiting import Endings
from nexrl_gateway.watch import Watch


@dataclass(frozen=True, slots=True)
class Room:
    """What one process does at a time of what takes memory, or the interpreter, from everybody
    else."""

    small_bodies: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(32))
    large_bodies: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))
    parsing: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(1))
    looking: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(4))
    """Threads of their own for /health, which must answer when all others are taken."""


@dataclass(frozen=True, slots=True)
class Services:
    """Everything that a request may touch. ``started_at`` is seconds since the epoch."""

    settings: Settings
    ledger: Ledger
    store: PayloadStore
    endings: Endings
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
            endings=Endings(settings.redis_url),
            roots=Roots.of(settings),
        )

    async def close(self) -> None:
        """End the waits and the connections."""
        await self.endings.close()
        self.ledger.close()


def services_of(request: Request) -> Services:
    """The services of the app that got ``request``; a FastAPI dependency."""
    services: Services = request.app.state.services
    return services
