"""Worker groups: make one, and look at those that live."""

from __future__ import annotations

from typing import Annotated

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Request
from nexrl_contract.operations import INITIALIZE, OPERATIONS
from starlette.responses import Response

from nexrl_gateway.admission import named_identifier, resolve
from nexrl_gateway.answers import answer, initialized
from nexrl_gateway.bodies import content_kind, json_body
from nexrl_gateway.docs import accepted, errors
from nexrl_gateway.docs import answer as shown
from nexrl_gateway.examples import GROUP, MODELS, OPERATION_ANSWERS, WORKER_INFO
from nexrl_gateway.groups import initialize, read_wanted
from nexrl_gateway.responses import Preferences, json_response, read_preferences
from nexrl_gateway.routes.operations import Identifier
from nexrl_gateway.services import Services, services_of
from nexrl_gateway.status import models, worker_info

Here = Annotated[Services, Depends(services_of)]
router = APIRouter(tags=["groups"])
_ROW = OPERATIONS[INITIALIZE]
_BODY = {"schema": _ROW.params.model_json_schema(), "examples": {"two ranks": {"value": GROUP}}}


@router.post(
    _ROW.path,
    summary=_ROW.summary,
    responses={
        **shown(OPERATION_ANSWERS[_ROW.name]),
        **accepted(_ROW.name),
        **errors(400, 409, 413, 415, 422, 500, 504),
    },
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": _BODY}}},
)
async def initialize_worker(
    request: Request,
    services: Here,
    preferences: Annotated[Preferences, Depends(read_preferences)],
    identifier: Identifier = None,
) -> Response:
    """Waits for free slots and starts the ranks; a living group with equal settings answers
    ``already: true``."""
    content_kind(request, frames=False)
    async with json_body(request, tensors=False) as document:
        wanted = await run_sync(
            read_wanted, document, named_identifier(identifier, document), services.roots
        )
    group, job, already = await run_sync(initialize, services, wanted, preferences.key)
    if job is None or (already and job.final):
        return initialized(group, wanted.ignored, wanted.said)
    return await answer(services, job, preferences, {"already": True} if already else None)


@router.get("/get_models", summary="The living groups", responses={**shown(MODELS), **errors()})
async def get_models(services: Here) -> Response:
    """Their roles, states and heartbeats."""
    return json_response(await run_sync(models, services))


@router.get(
    "/worker_info",
    summary="One group in detail",
    responses={**shown(WORKER_INFO), **errors(400, 404, 422)},
)
async def get_worker_info(services: Here, identifier: Identifier = None) -> Response:
    """The group's record, and what its ranks say of themselves."""
    return json_response(worker_info(await run_sync(resolve, services.ledger, identifier)))
