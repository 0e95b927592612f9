"""Is it alive, is it ready, what is it doing."""

from __future__ import annotations

from typing import Annotated

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.responses import PlainTextResponse, Response

from nexrl_gateway.docs import answer, errors, unavailable
from nexrl_gateway.examples import HEALTH, METRICS, NOT_READY, READY, UNHEALTHY
from nexrl_gateway.responses import json_response
from nexrl_gateway.services import Services, services_of
from nexrl_gateway.status import health, metrics, ready

Here = Annotated[Services, Depends(services_of)]
router = APIRouter(tags=["health"])


@router.get(
    "/health",
    summary="Redis, the payload store, each group and its last heartbeat",
    responses={**answer(HEALTH), **unavailable(UNHEALTHY)},
)
async def show_health(services: Here) -> Response:
    """200 with ``status`` healthy, or degraded with its ``reasons``; 503 while Redis or the store
    is away."""
    report, serving = await run_sync(health, services, limiter=services.room.looking)
    return json_response(report, 200 if serving else 503)


@router.get(
    "/ready",
    summary="Whether requests can be served",
    responses={**answer(READY), **unavailable(NOT_READY)},
)
async def show_ready(services: Here) -> Response:
    """200, or 503 where Redis or a disk would not keep what is asked for; ``reasons`` as in
    /health."""
    report, sound = await run_sync(ready, services, limiter=services.room.looking)
    return json_response(report, 200 if sound else 503)


@router.get(
    "/metrics",
    summary="Gauges for Prometheus",
    response_class=PlainTextResponse,
    responses={
        200: {"description": "Done", "content": {"text/plain": {"example": METRICS}}},
        **errors(),
    },
)
async def show_metrics(services: Here) -> Response:
    """Prometheus' text format."""
    return PlainTextResponse(await run_sync(metrics, services), media_type=CONTENT_TYPE_PLAIN_0_0_4)
