"""Jobs: look at one, wait for one, get its result, cancel one."""

from __future__ import annotations

from typing import Annotated

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Query
from nexrl_contract.records import JobRecord
from starlette.responses import Response

from nexrl_gateway.answers import job_view, result_response
from nexrl_gateway.docs import answer, errors, operation_results
from nexrl_gateway.examples import CANCELLED, JOB, JOBS
from nexrl_gateway.groups import cancel
from nexrl_gateway.responses import Preferences, json_response, read_preferences
from nexrl_gateway.services import Services, services_of

Wait = Annotated[float, Query(ge=0, le=30, description="Seconds to wait for the job to end.")]
Here = Annotated[Services, Depends(services_of)]
router = APIRouter(tags=["jobs"])


@router.get("/jobs", summary="The newest jobs first", responses={**answer(JOBS), **errors(422)})
async def list_jobs(
    services: Here, identifier: str | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 100
) -> Response:
    """Jobs of one group, or of all."""

    def views() -> list[object]:
        return [job_view(services.ledger, job) for job in services.ledger.jobs(identifier, limit)]

    return json_response({"jobs": await run_sync(views)})


@router.get("/jobs/{job_id}", summary="One job", responses={**answer(JOB), **errors(404, 410, 422)})
async def show_job(services: Here, job_id: str, wait: Wait = 0.0) -> Response:
    """The job as it is when it has ended, or after ``wait`` seconds."""
    job = await _job(services, job_id, wait)
    return json_response(await run_sync(job_view, services.ledger, job))


@router.get(
    "/jobs/{job_id}/result",
    summary="What the operation answered",
    responses={**operation_results(), **errors(404, 409, 410, 422, 500, 507)},
)
async def show_result(
    services: Here,
    job_id: str,
    preferences: Annotated[Preferences, Depends(read_preferences)],
    wait: Wait = 0.0,
) -> Response:
    """Exactly the answer of the synchronous call, or its error with its own status; 409 while the
    job has not ended."""
    return await result_response(services, await _job(services, job_id, wait), preferences)


@router.delete(
    "/jobs/{job_id}",
    summary="Cancel a job that has not started",
    responses={**answer(CANCELLED), **errors(404, 409, 410, 422)},
)
async def cancel_job(services: Here, job_id: str) -> Response:
    """A running job is not interrupted: 409."""
    job = await run_sync(cancel, services, job_id)
    return json_response(await run_sync(job_view, services.ledger, job))


async def _job(services: Services, job_id: str, wait_s: float) -> JobRecord:
    return await services.completions.final(job_id, wait_s)
