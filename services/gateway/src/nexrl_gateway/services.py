"""What one gateway process works with, made at start-up and passed to whatever needs it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Self

from fastapi import Request
from nexrl_ledger import Ledger, connect
from nexrl_payloads import PayloadStore, open_store

from nexrl_gateway.paths import Roots
from nexrl_gateway.settings import Settings
from nexrl_gateway.waiting import Endings


@dataclass(frozen=True, slots=True)
class Services:
    """Everything that a request may touch. ``started_at`` is seconds since the epoch."""

    settings: Settings
    ledger: Ledger
    store: PayloadStore
    endings: Endings
    roots: Roots
    started_at: float = field(default_factory=time.time)

    @classmethod
    def start(cls, settings: Settings) -> Self:
        """Needs a running event loop, not Redis. Raises STORE_UNAVAILABLE for a folder that cannot be made."""
        return cls(
            settings=settings,
            ledger=Ledger(connect(settings.redis_url)),
            store=open_store(settings.payloads, fsync=settings.fsync),
            endings=Endings(settings.redis_url),
            roots=Roots.of(settings),
        )

    async def close(self) -> None:
        """End the waits and the connections."""
        await self.endings.close()
        self.ledger.client.close()


def services_of(request: Request) -> Services:
    """The services of the app that got ``request``; a FastAPI dependency."""
    services: Services = request.app.state.services
    return services
