"""The application: routes, error handlers, and what lives as long as the process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from nexrl_gateway.docs import with_nulls
from nexrl_gateway.errors import add_error_handlers
from nexrl_gateway.janitor import keep_clean
from nexrl_gateway.origins import OwnOrigin
from nexrl_gateway.replies import marked
from nexrl_gateway.routes import groups, health, jobs, operations, payloads
from nexrl_gateway.services import Services
from nexrl_gateway.settings import Settings

_DESCRIPTION = """\
Training of language models on worker groups: make a group, load a model, send batches.

Every operation answers when it is done; `Prefer: respond-async` answers 202 with a job to ask for.
An `Idempotency-Key` makes a repeated request the same job. Errors have one shape: `{"error":
{"code", "message", ...}}`. Whatever is asked, pages of another origin get 403, another `Host` 421,
and a request whose bytes stop coming 408."""


class _Application(FastAPI):
    """FastAPI, whose answers say which request they are of, and whose page keeps what is null in an
    example."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await super().__call__(
            scope, receive, marked(scope, send) if scope["type"] == "http" else send
        )

    def openapi(self) -> dict[str, Any]:
        if not self.openapi_schema:
            self.openapi_schema = with_nulls(super().openapi())
        return self.openapi_schema


def create_app(settings: Settings) -> FastAPI:
    """A gateway that its lifespan starts and ends. Several may live in one process."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services = Services.start(settings)
        app.state.services = services
        tasks = [
            asyncio.create_task(keep_clean(services)),
            asyncio.create_task(services.watch.run(services.room.looking)),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await services.close()

    app = _Application(
        title="NexRL Training Service",
        version="0.1.0",
        description=_DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.add_middleware(OwnOrigin, settings=settings)
    add_error_handlers(app)
    for routes in (groups, operations, jobs, payloads, health):
        app.include_router(routes.router)
    return app
