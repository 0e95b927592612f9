"""One endpoint for each operation of a worker group."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Query, Request
from nexrl_contract.operations import DESTROY, INITIALIZE, OPERATIONS, Operation
from starlette.responses import Response

from nexrl_gateway.answers import answer
from nexrl_gateway.docs import errors, operation_answers
from nexrl_gateway.examples import request_body
from nexrl_gateway.groups import destroy_idle
from nexrl_gateway.responses import Preferences, read_preferences
from nexrl_gateway.services import services_of
from nexrl_gateway.submit import submit_operation

Identifier = Annotated[
    str | None, Query(description="The worker group; may be left out while there is only one.")
]
router = APIRouter(tags=["operations"])


def _endpoint(operation: Operation) -> Callable[..., Awaitable[Response]]:
    async def handle(
        request: Request,
        preferences: Annotated[Preferences, Depends(read_preferences)],
        identifier: Identifier = None,
    ) -> Response:
        services = services_of(request)
        job = await submit_operation(services, operation, request, identifier, preferences.key)
        if operation.name == DESTROY:
            await run_sync(destroy_idle, services, job)
        return await answer(services, job, preferences)

    return handle


for _operation in OPERATIONS.values():
    if _operation.name == INITIALIZE:  # which has no group yet
        continue
    router.add_api_route(
        _operation.path,
        _endpoint(_operation),
        methods=["POST"],
        name=_operation.name,
        operation_id=_operation.name,
        summary=_operation.summary,
        responses={
            **operation_answers(_operation),
            **errors(400, 404, 409, 410, 413, 415, 422, 429, 500, 504, 507),
        },
        openapi_extra={"requestBody": request_body(_operation)},
    )
