"""The shapes of answers: a model each of what the gateway says itself, JSON, and the one error body
of the service; nothing internal leaks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import redis
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from nexrl_contract.errors import RETRY_AFTER_S, ServiceError, argument_error
from nexrl_contract.names import JSON_TYPE, REQUEST_ID_HEADER
from nexrl_contract.records import GroupState, JobState, Share
from nexrl_contract.results import JOB_ID, ModelInfo
from nexrl_ledger import is_away
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SkipValidation
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Scope, Send
from tensor_codec import CodecError

from nexrl_gateway.strict_json import json_bytes

AT_S = 1767225600.0
"""Seconds since the epoch, of the examples."""
_PAYLOAD = "0123456789abcdef0123456789abcdef"


class View(BaseModel):
    """An answer of the gateway's own, made of records; times are seconds since the epoch."""

    model_config = ConfigDict(
        from_attributes=True, json_schema_serialization_defaults_required=True
    )


class ErrorDetail(View):
    """What went wrong; further fields (tensor, row, key, nearest, ...) say where."""

    code: str = Field(examples=["JOB_CANCELLED"])
    message: str = Field(examples=["the job was cancelled before it ran"])
    retryable: bool
    identifier: str | None
    job_id: str | None
    rank: int | None


class ErrorBody(View):
    """The one shape of every error."""

    error: ErrorDetail


class JobView(View):
    """A job; ``waits_for`` says why it has not begun."""

    id: str = Field(examples=[JOB_ID])
    operation: str = Field(examples=["update_actor"])
    identifier: str = Field(examples=["student"])
    state: JobState
    waits_for: str | None
    attempt: int
    epoch: int | None
    created_at: float = Field(examples=[AT_S])
    started_at: float | None
    finished_at: float | None
    error: SkipValidation[ErrorDetail | None]
    result_url: str | None = Field(examples=[f"/jobs/{JOB_ID}/result"])


class CancelledJobView(JobView):
    """A job that will not run."""

    state: JobState = Field(examples=["cancelled"])
    error: ErrorDetail


class JobList(View):
    """The newest first."""

    jobs: list[JobView]


class PartView(View):
    """One part of an upload."""

    payload: str = Field(examples=[_PAYLOAD])
    part: int
    nbytes: int = Field(examples=[104857600])


class PayloadView(View):
    """The parts of an upload that are there, and their bytes."""

    payload: str = Field(examples=[_PAYLOAD])
    parts: list[int] = Field(examples=[[0, 1, 2]])
    nbytes: int = Field(examples=[262144000])


class GroupView(View):
    """A worker group."""

    world_size: int = Field(examples=[2])
    role: str = Field(examples=["actor"])
    state: GroupState = Field(examples=["ready"])
    initialised: bool = Field(examples=[True])
    epoch: int = Field(examples=[1])
    last_heartbeat: float | None = Field(validation_alias="heartbeat", examples=[AT_S])
    cause: str | None
    agent: str | None = Field(validation_alias="leader", examples=["local"])


class GroupList(View):
    """Every group that was not destroyed."""

    status: Literal["success"] = "success"
    identifiers: list[str] = Field(examples=[["student"]])
    count: int
    models: dict[str, GroupView]


class _Named(View):
    status: Literal["success"] = "success"
    identifier: str = Field(examples=["student"])


class RanksInfo(ModelInfo):
    """What rank 0 says of the model and of itself; nothing before ``init_model``."""

    host: str
    pid: int


def _hosts(placement: list[Share]) -> list[str]:
    return [share.host for share in placement]


class WorkerInfo(GroupView, _Named):
    """A group's whole record."""

    seq: int
    nodes: Annotated[list[str], BeforeValidator(_hosts)] = Field(
        validation_alias="placement", examples=[["gpu-1"]]
    )
    running_job: str | None
    ignored: list[str]
    config: dict[str, Any] = Field(examples=[{"model": {"path": "/models/tiny"}}])
    created_at: float = Field(examples=[AT_S])
    info: SkipValidation[RanksInfo]


class ProcessView(View):
    """An agent or a checkpointer."""

    name: str = Field(examples=["local"])
    host: str = Field(examples=["gpu-1"])
    device: str = Field(examples=["cpu"])
    slots: int = Field(examples=[4])
    free: int = Field(examples=[2])
    last_heartbeat: float = Field(validation_alias="heartbeat", examples=[AT_S])


class Slots(View):
    """Of all agents."""

    total: int = Field(examples=[4])
    free: int = Field(examples=[2])


class Outage(View):
    """How the service is while Redis or the payload store is away."""

    status: Literal["healthy", "degraded"] = Field(examples=["degraded"])
    redis: str = Field(examples=["unavailable"])
    payload_store: str = Field(examples=["ok"])
    reasons: list[str] = Field(examples=[["Redis does not answer"]])


class Health(Outage):
    """How the service is; ``reasons`` say why it is degraded."""

    status: Literal["healthy", "degraded"]
    redis: str = Field(examples=["ok"])
    reasons: list[str]
    groups: dict[str, GroupView]
    agents: list[ProcessView]
    checkpointers: list[ProcessView]
    slots: Slots


class NotReady(View):
    """Redis or a disk would not keep what is asked for."""

    ready: bool
    redis: str = Field(examples=["unavailable"])
    payload_store: str = Field(examples=["ok"])
    reasons: list[str] = Field(examples=[["Redis does not answer"]])


class Ready(NotReady):
    """What is asked for now would be done and kept; ``reasons`` as in /health."""

    ready: bool = Field(examples=[True])
    redis: str = Field(examples=["ok"])
    reasons: list[str]


_REQUEST_ID = REQUEST_ID_HEADER.lower().encode()
_LONGEST_ID = 128


def json_response(
    content: BaseModel | dict[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A response of ``content``; 429 and 503 say when to come again."""
    if isinstance(content, BaseModel):  # what was not validated is written as it is
        content = content.model_dump(warnings=False)
    again = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else {}
    return Response(json_bytes(content), status, {**again, **(headers or {})}, JSON_TYPE)


def marked(scope: Scope, send: Send) -> Send:
    """``send`` for the answer of one request, which repeats that request's mark and is kept by no
    cache for another."""
    marks = [
        (name, value)
        for name, value in scope["headers"]
        if name == _REQUEST_ID and len(value) <= _LONGEST_ID
    ]
    added = [(b"cache-control", b"no-store"), *marks[:1]]

    async def send_marked(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        await send(message)

    return send_marked


_BY_STATUS = {404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED"}


def add_error_handlers(app: FastAPI) -> None:
    """Every error leaves ``app`` as ``{"error": {...}}``; what nobody expected the server logs with
    its traceback."""
    known = (ServiceError, CodecError, RequestValidationError, HTTPException, ClientDisconnect)
    for kind in (*known, Exception):
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(redis.exceptions.RedisError, _answer_for_redis)


async def _answer(request: Request, error: Exception) -> Response:
    return error_response(as_service_error(error, request))


async def _answer_for_redis(request: Request, error: Exception) -> Response:
    if not is_away(error):
        raise error
    return await _answer(request, error)


def error_response(error: ServiceError) -> Response:
    """The error's body with its status. What a slow request still sends nobody waits for."""
    headers = {"Connection": "close"} if error.code == "SLOW_REQUEST" else None
    return json_response({"error": error.body()}, error.kind.status, headers)


def as_service_error(error: Exception, request: Request) -> ServiceError:
    """The error that a user may see for ``error``."""
    match error:
        case ServiceError():
            return error
        case CodecError():
            return ServiceError("MALFORMED", str(error))
        case RequestValidationError():
            return argument_error([{**each, "loc": each["loc"][1:]} for each in error.errors()])
        case HTTPException():
            code = _BY_STATUS.get(error.status_code, "INTERNAL")
            asked = f"{request.method} {request.url.path[:200]}"
            return ServiceError(code, f"{asked}: {error.detail}; /docs lists what there is")
        case ClientDisconnect():
            return ServiceError("MALFORMED", "the connection ended before the body did")
        case redis.exceptions.AuthenticationError():
            message = "Redis does not take the gateway's password"
            return ServiceError("REDIS_UNAVAILABLE", message, retryable=False)
    if is_away(error):
        return ServiceError("REDIS_UNAVAILABLE", "Redis does not answer; try again shortly")
    message = "something unexpected went wrong in the gateway; its log has the details"
    return ServiceError("INTERNAL", message)
