"""From a job to its answer: the result as JSON or frame, the error, or the promise of one, as the
request prefers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Annotated

import redis
from anyio.to_thread import run_sync
from fastapi import Header
from fastapi.responses import StreamingResponse
from nexrl_contract import envelope, names
from nexrl_contract.errors import ServiceError
from nexrl_contract.names import FRAME_TYPE, KEY_PATTERN, valid_idempotency_key
from nexrl_contract.operations import INITIALIZE, OPERATIONS
from nexrl_contract.records import GroupRecord, JobRecord
from nexrl_ledger import Ledger
from starlette.background import BackgroundTask
from starlette.responses import Response
from tensor_codec import RawTensor, to_json

from nexrl_gateway.responses import JobView, json_response
from nexrl_gateway.services import Services
from nexrl_gateway.strict_json import JSON, finite
from nexrl_gateway.submit import without_agent
from nexrl_gateway.uploads import StoredFrame, read_frame


@dataclass(frozen=True, slots=True)
class Preferences:
    """``respond_async`` answers 202 unless the job ends within ``wait_s``; ``frame`` prefers
    tensors in a frame."""

    key: str | None = None
    respond_async: bool = False
    wait_s: float = 0.0
    frame: bool = False


def read_preferences(
    idempotency_key: Annotated[
        str | None,
        Header(
            description=(
                "The same key and content again give the first job again; other content is refused."
            ),
            examples=["step-17-try"],
        ),
    ] = None,
    prefer: Annotated[
        str | None,
        Header(
            description=(
                "`respond-async` answers 202 at once; `respond-async, wait=S` after at most S "
                "seconds."
            )
        ),
    ] = None,
    accept: Annotated[
        str | None, Header(description=f"`{FRAME_TYPE}` gets result tensors as a binary frame.")
    ] = None,
) -> Preferences:
    """A FastAPI dependency; raises INVALID_ARGUMENT for a bad key. Unknown preferences are ignored
    (RFC 7240)."""
    if idempotency_key is not None and not valid_idempotency_key(idempotency_key):
        raise ServiceError(
            "INVALID_ARGUMENT", f"Idempotency-Key must match {KEY_PATTERN}", key="Idempotency-Key"
        )
    preferences = dict(_preference(part) for part in (prefer or "").split(","))
    return Preferences(
        key=idempotency_key,
        respond_async="respond-async" in preferences,
        wait_s=_seconds(preferences.get("wait", "")),
        frame=FRAME_TYPE in (accept or "").lower(),
    )


def _preference(part: str) -> tuple[str, str]:
    name, _, value = part.partition("=")
    return name.strip().lower(), value.strip().strip('"')


def _seconds(text: str) -> float:
    return float(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0.0


async def answer(
    services: Services, job: JobRecord, preferences: Preferences, extra: JSON | None = None
) -> Response:
    """Wait for the job as long as ``preferences`` and the gateway's limit allow, and say what has
    become of it.

    ``extra`` is added to the JSON of operations without a batch. Raises the job's own error, or
    WAIT_LIMIT with its id.
    """
    limit = services.settings.wait_limit_s
    wait_s = min(preferences.wait_s, limit) if preferences.respond_async else limit
    if wait_s > 0 and not job.final:
        job = await services.completions.final(job.id, wait_s)
    if job.final:
        return await result_response(services, job, preferences, extra)
    if preferences.respond_async:
        headers = {"Location": f"/jobs/{job.id}", "Preference-Applied": "respond-async"}
        return json_response(await run_sync(job_view, services.ledger, job), 202, headers)
    message = (
        f"job {job.id} is {job.state}; the gateway waits no longer, the job goes on: GET "
        f"/jobs/{job.id}/result"
    )
    raise ServiceError("WAIT_LIMIT", message, **_about(job))


async def result_response(
    services: Services, job: JobRecord, preferences: Preferences, extra: JSON | None = None
) -> Response:
    """The answer of an ended job; raises its error, or what :func:`_unfinished` says of one that
    has not ended."""
    if not job.final:
        raise await run_sync(_unfinished, services, job)
    _raise_unless_finished(job)
    response = await run_sync(_response, services, job, preferences.frame, extra or {})
    if job.result_payload is not None:
        response.background = BackgroundTask(_after_delivery, services.ledger, job.id, response)
    return response


def _after_delivery(ledger: Ledger, job_id: str, response: Response) -> None:
    """Note that the whole result has gone out; a connection that broke before leaves it as it
    was."""
    if not isinstance(response, FrameResponse) or response.complete:
        with contextlib.suppress(redis.exceptions.RedisError):  # it is kept for longer then
            ledger.retention.delivered(job_id)


def initialized(group: GroupRecord, ignored: list[str], said: JSON) -> Response:
    """The answer of ``initialize`` for a group that is there already, with what else is ``said`` of
    the request."""
    return json_response(
        {
            "status": "success",
            "identifier": group.identifier,
            "job_id": group.placement_job,
            "role": group.role,
            "world_size": group.world_size,
            "ignored": ignored,
            "already": True,
            **said,
        }
    )


def job_view(ledger: Ledger, job: JobRecord) -> JobView:
    """What ``/jobs`` shows of a job; a queued one says why it waits."""
    derived = {
        "waits_for": _waits_for(ledger, job),
        "result_url": f"/jobs/{job.id}/result" if job.final else None,
    }
    return JobView.model_validate({**dict(job), **derived})


def _unfinished(services: Services, job: JobRecord) -> ServiceError:
    """JOB_RUNNING with what the job waits for, or GROUP_DOWN where that does not come by itself;
    the job stays."""
    if _lacks_agent(services.ledger, job):
        error = without_agent(services, **_about(job))
        if not error.retryable:
            return error
    message = f"job {job.id} is {job.state}; ask again, or with ?wait=30"
    waits_for = _waits_for(services.ledger, job)
    return ServiceError("JOB_RUNNING", message, waits_for=waits_for, **_about(job))


def _about(job: JobRecord) -> dict[str, str]:
    return {"job_id": job.id, "identifier": job.identifier}


def _lacks_agent(ledger: Ledger, job: JobRecord) -> bool:
    return job.state == "queued" and job.queue == names.AGENT_QUEUE and not ledger.agents.heard()


def _waits_for(ledger: Ledger, job: JobRecord) -> str | None:
    if _lacks_agent(ledger, job):
        return "a worker agent: none is alive, start one"
    if job.state != "queued" or job.waits_for:
        return job.waits_for
    group = ledger.groups.get(job.identifier)
    if group is not None and group.placement:
        silent = ", ".join(group.unheard({agent.name for agent in ledger.agents.heard()}))
        if silent:
            return f"agent {silent}, which is not heard; the group goes down where it stays away"
    ahead = ledger.ahead_of(job)
    if not ahead:
        return f"the consumer of {job.queue}"
    return f"{ahead} operation{'s' if ahead > 1 else ''} ahead of it in {job.queue}"


def _raise_unless_finished(job: JobRecord) -> None:
    if job.state == "rolled_back":
        message = f"job {job.id} was rolled back by a restart: its effect is not in the weights"
        raise ServiceError("JOB_ROLLED_BACK", message, **_about(job))
    if job.state != "finished":
        error = ServiceError.from_body(job.error or {"message": f"job {job.id} is {job.state}"})
        error.details = {**_about(job), **error.details}
        raise error


class FrameResponse(StreamingResponse):
    """A frame in pieces; ``complete`` once the last one has been taken."""

    def __init__(self, pieces: Iterable[bytes], nbytes: int) -> None:
        self.complete = False
        super().__init__(
            self._watched(pieces), media_type=FRAME_TYPE, headers={"Content-Length": str(nbytes)}
        )

    def _watched(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        yield from pieces
        self.complete = True


def _response(services: Services, job: JobRecord, frame: bool, extra: JSON) -> Response:
    stored = _stored(services, job)
    beside = envelope.read(stored.header.metadata) if stored else {}
    result = {**beside, **(job.result or {})}
    if not OPERATIONS[job.operation].takes_batch:
        placed = {"already": False, **job.params} if job.operation == INITIALIZE else {}
        ignored = {"ignored": job.ignored} if job.ignored or placed else {}
        done = {"status": "success", "identifier": job.identifier, "job_id": job.id}
        return json_response({**done, **ignored, **placed, **result, **extra})
    metrics, meta_info = result.pop("metrics", {}), _meta_info(job, result)
    if frame and stored is not None and stored.header.tensors:
        said = {"metrics": metrics, "meta_info": meta_info}
        # The stored tensors under a header of our own, which says what only the ledger knows.
        head = stored.header.with_metadata(envelope.written(finite(said)))
        return FrameResponse(chain([head], stored.body), len(head) + stored.nbytes)
    batch = _json_tensors(stored) if stored else {}
    return json_response(
        {"batch": batch, "metrics": metrics, "meta_info": {"metrics": metrics, **meta_info}}
    )


def _meta_info(job: JobRecord, result: JSON) -> JSON:
    """What the ranks said besides metrics, and what the ledger knows of the job."""
    said: JSON = result.pop("meta_info", {}) or {}
    began, ended = job.started_at or job.created_at, job.finished_at or 0.0
    timing = {"queued_s": began - job.created_at, "run_s": ended - began, **said.get("timing", {})}
    known = {**_about(job), "operation": job.operation, "ignored": job.ignored}
    return {**said, **result, **known, "timing": timing}


def _stored(services: Services, job: JobRecord) -> StoredFrame | None:
    if job.result_payload is None:
        return None
    store = services.store
    try:
        # Held before it is read: the janitor may be about to remove it.
        if not services.ledger.retention.hold_result(job.id):
            raise _expired(services, job)
        for _ in store.stream(job.result_payload.id, job.result_payload.checksum):
            pass  # before the answer begins: in its middle there is no way to say what is wrong
        return read_frame(store, job.result_payload)
    except ServiceError as error:
        if error.code == "PAYLOAD_DAMAGED":
            raise _damaged(job) from None
        if error.code != "PAYLOAD_NOT_FOUND":
            raise
        raise _expired(services, job) from None


def _expired(services: Services, job: JobRecord) -> ServiceError:
    message = (
        f"the result of job {job.id} is gone: it is kept for a day, or for "
        f"{services.settings.result_kept_s:g} s after it was fetched"
    )
    return ServiceError("EXPIRED", message, **_about(job))


def _damaged(job: JobRecord) -> ServiceError:
    effect = "call it again" if job.seq is None else "the operation was applied, do not repeat it"
    message = (
        f"the result of job {job.id} changed while it was stored, on disk, in memory or in Redis: "
        f"{effect}"
    )
    return ServiceError("PAYLOAD_DAMAGED", message, retryable=False, **_about(job))


def _json_tensors(stored: StoredFrame) -> JSON:
    data = memoryview(b"".join(stored.body))
    return {
        name: to_json(RawTensor(info.dtype, info.shape, data[info.start : info.end]))
        for name, info in stored.header.tensors.items()
    }
