"""Jobs: look at one, wait for one, get its result, cancel one."""

from __future__ import annotations

from typing import Annotated

from anyio.to_thread import run_sync
from fastapi import APIRouter, Query
from starlette.responses import Response

from nexrl_gateway.groups import cancel
from nexrl_gateway.jobs import job_view, result_response
from nexrl_gateway.openapi import answered, refused, result_responses
from nexrl_gateway.responses import CancelledJobView, JobList, JobView, json_response
from nexrl_gateway.routes.operations import Preferred
from nexrl_gateway.services import Here

Wait = Annotated[float, Query(ge=0, le=30, description="Seconds to wait for the job to end.")]
router = APIRouter(tags=["jobs"])


@router.get(
    "/jobs", summary="The newest jobs first", responses={**answered(JobList), **refused(422)}
)
async def list_jobs(
    services: Here, identifier: str | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 100
) -> Response:
    """Jobs of one group, or of all."""

    def views() -> JobList:
        ledger = services.ledger
        return JobList(jobs=[job_view(ledger, job) for job in ledger.jobs(identifier, limit)])

    return json_response(await run_sync(views))


@router.get(
    "/jobs/{job_id}",
    summary="One job",
    responses={**answered(JobView), **refused(404, 410, 422)},
)
async def show_job(services: Here, job_id: str, wait: Wait = 0.0) -> Response:
    """The job as it is when it has ended, or after ``wait`` seconds."""
    job = await services.completions.final(job_id, wait)
    return json_response(await run_sync(job_view, services.ledger, job))


@router.get(
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


@router.delete(
    "/jobs/{job_id}",
    summary="Cancel a job that has not started",
    responses={**answered(CancelledJobView), **refused(404, 409, 410, 422)},
)
async def cancel_job(services: Here, job_id: str) -> Response:
    """A running job is not interrupted: 409."""
    job = await run_sync(cancel, services, job_id)
    return json_response(await run_sync(job_view, services.ledger, job))
