"""One endpoint for each operation of a worker group, and what can be asked of its jobs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Query, Request
from nexrl_contract.operations import DESTROY, INITIALIZE, OPERATIONS, Operation
from starlette.responses import Response

from nexrl_gateway.bodies import content_kind, json_body
from nexrl_gateway.groups import cancel, destroy_idle, initialize, read_group_request
from nexrl_gateway.jobs import (
    Preferences,
    answer,
    initialized,
    job_view,
    read_preferences,
    result_response,
)
from nexrl_gateway.openapi import (
    answered,
    operation_responses,
    refused,
    request_body,
    result_responses,
)
from nexrl_gateway.responses import CancelledJobView, JobList, JobView, json_response
from nexrl_gateway.services import Here
from nexrl_gateway.submit import named_identifier, submit_operation

Identifier = Annotated[
    str | None, Query(description="The worker group; may be left out while there is only one.")
]
Preferred = Annotated[Preferences, Depends(read_preferences)]
Wait = Annotated[float, Query(ge=0, le=30, description="Seconds to wait for the job to end.")]
router = APIRouter(tags=["operations"])
jobs = APIRouter(tags=["jobs"])


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


@jobs.get(
    "/jobs",
    summary="The newest jobs first",
    responses={**answered(JobList), **refused(422)},
)
async def list_jobs(
    services: Here, identifier: str | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 100
) -> Response:
    """Jobs of one group, or of all."""

    def views() -> JobList:
        ledger = services.ledger
        return JobList(jobs=[job_view(ledger, job) for job in ledger.jobs(identifier, limit)])

    return json_response(await run_sync(views))


@jobs.get(
    "/jobs/{job_id}",
    summary="One job",
    responses={**answered(JobView), **refused(404, 410, 422)},
)
async def show_job(services: Here, job_id: str, wait: Wait = 0.0) -> Response:
    """The job as it is when it has ended, or after ``wait`` seconds."""
    job = await services.completions.final(job_id, wait)
    return json_response(await run_sync(job_view, services.ledger, job))


@jobs.get(
    "/jobs/{job_id}/result",
    summary="What the operation answered",
    responses={**result_responses(), **refused(404, 409, 410, 422, 500, 507)},
)
async def show_result(
    services: Here, job_id: str, preferences: Preferred, wait: Wait = 0.0
) -> Response:
    """Exactly the answer of the synchronous call, or its error with its own status; 409 while the
    job has not ended."""
    job = await services.completions.final(job_id, wait)
    return await result_response(services, job, preferences)


@jobs.delete(
    "/jobs/{job_id}",
    summary="Cancel a job that has not started",
    responses={**answered(CancelledJobView), **refused(404, 409, 410, 422)},
)
async def cancel_job(services: Here, job_id: str) -> Response:
    """A running job is not interrupted: 409."""
    job = await run_sync(cancel, services, job_id)
    return json_response(await run_sync(job_view, services.ledger, job))
