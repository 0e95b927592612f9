"""One endpoint for each operation of a worker group."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Query, Request
from nexrl_contract.operations import DESTROY, INITIALIZE, OPERATIONS, Operation
from starlette.responses import Response

from nexrl_gateway.bodies import content_kind, json_body
from nexrl_gateway.groups import destroy_idle, initialize, read_group_request
from nexrl_gateway.jobs import Preferences, answer, initialized, read_preferences
from nexrl_gateway.openapi import operation_responses, refused, request_body
from nexrl_gateway.services import Here
from nexrl_gateway.submit import named_identifier, submit_operation

Identifier = Annotated[
    str | None, Query(description="The worker group; may be left out while there is only one.")
]
Preferred = Annotated[Preferences, Depends(read_preferences)]
router = APIRouter(tags=["operations"])


async def _initialize(
    request: Request, services: Here, preferences: Preferred, identifier: Identifier = None
) -> Response:
    """Waits for free slots and starts the ranks; a living group with equal settings answers
    ``already: true``."""
    content_kind(request, frames=False)
    async with json_body(request, tensors=False) as document:
        asked = await run_sync(
            read_group_request, document, named_identifier(identifier, document), services.roots
        )
    group, job, already = await run_sync(initialize, services, asked, preferences.key)
    if job is None or (already and job.final):
        return initialized(group, asked.ignored, asked.said)
    return await answer(services, job, preferences, {"already": True} if already else None)


def _endpoint(operation: Operation) -> Callable[..., Awaitable[Response]]:
    async def handle(
        request: Request, services: Here, preferences: Preferred, identifier: Identifier = None
    ) -> Response:
        job = await submit_operation(services, operation, request, identifier, preferences.key)
        if operation.name == DESTROY:
            await run_sync(destroy_idle, services, job)
        return await answer(services, job, preferences)

    return handle


for _operation in OPERATIONS.values():
    router.add_api_route(
        _operation.path,
        _initialize if _operation.name == INITIALIZE else _endpoint(_operation),
        methods=["POST"],
        name=_operation.name,
        operation_id=_operation.name,
        summary=_operation.summary,
        responses={
            **operation_responses(_operation),
            **refused(400, 404, 409, 410, 413, 415, 422, 429, 500, 504, 507),
        },
        openapi_extra={"requestBody": request_body(_operation)},
    )
