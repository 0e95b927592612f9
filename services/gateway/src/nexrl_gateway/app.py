"""The application: routes, error handlers, and what lives as long as the process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from importlib.metadata import version

import redis
from anyio.to_thread import run_sync
from fastapi import FastAPI
from nexrl_contract.errors import ServiceError
from starlette.types import Receive, Scope, Send

from nexrl_gateway import upkeep
from nexrl_gateway.openapi import with_examples
from nexrl_gateway.origins import OwnOrigin
from nexrl_gateway.responses import add_error_handlers, marked
from nexrl_gateway.routes import jobs, operations, payloads, status
from nexrl_gateway.services import Services
from nexrl_gateway.settings import Settings
from nexrl_gateway.strict_json import JSON

_DESCRIPTION = """\
Training of language models on worker groups: make a group, load a model, send batches.

Every operation answers when it is done; `Prefer: respond-async` answers 202 with a job to ask for.
An `Idempotency-Key` makes a repeated request the same job. Errors have one shape: `{"error":
{"code", "message", ...}}`. Whatever is asked, pages of another origin get 403, another `Host` 421,
and a request whose bytes stop coming 408."""
_log = logging.getLogger(__name__)


class _Application(FastAPI):
    """FastAPI, whose answers say which request they are of, and whose page has examples."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await super().__call__(
            scope, receive, marked(scope, send) if scope["type"] == "http" else send
        )

    def openapi(self) -> JSON:
        if not self.openapi_schema:
            self.openapi_schema = with_examples(super().openapi())
        return self.openapi_schema


def create_app(settings: Settings) -> FastAPI:
    """A gateway that its lifespan starts and ends. Several may live in one process."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services = Services.start(settings)
        app.state.services = services
        tasks = [asyncio.create_task(_keep_clean(services)), asyncio.create_task(_look(services))]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await services.close()

    app = _Application(
        title="NexRL Training Service",
        version=version("nexrl-gateway"),
        description=_DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.add_middleware(OwnOrigin, settings=settings)
    add_error_handlers(app)
    for routes in (operations, jobs, payloads, status):
        app.include_router(routes.router)
    return app


async def _keep_clean(services: Services) -> None:
    """Sweep once a period until cancelled; a store or Redis that is away is tried again the next
    time."""
    lost = upkeep.LostGroups(services.ledger)
    while True:
        try:
            await run_sync(upkeep.sweep, services.settings, services.ledger, services.store)
            await run_sync(lost.look)
        except (redis.exceptions.RedisError, ServiceError) as error:
            lost.forget()
            _log.warning("janitor.failed error=%s", error)
        await asyncio.sleep(upkeep.sweep_period_s(services.settings))


async def _look(services: Services) -> None:
    """Look for what is stuck once a period until cancelled."""
    while True:
        try:
            await run_sync(services.watch.look, limiter=services.room.looking)
        except redis.exceptions.RedisError as error:
            services.watch.forget()
            _log.warning("watch.failed error=%s", error)
        await asyncio.sleep(upkeep.WATCH_PERIOD_S)
