"""How a request wants its answer, and the shapes of answers: JSON, and the one error body of the
service; nothing internal leaks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import redis
from fastapi import FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from nexrl_contract.config import argument_error
from nexrl_contract.errors import RETRY_AFTER_S, ServiceError
from nexrl_contract.names import (
    FRAME_TYPE,
    JSON_TYPE,
    KEY_PATTERN,
    REQUEST_ID_HEADER,
    valid_idempotency_key,
)
from nexrl_ledger import is_away
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Scope, Send
from tensor_codec import CodecError

from nexrl_gateway.strict_json import json_bytes


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


_REQUEST_ID = REQUEST_ID_HEADER.lower().encode()
_LONGEST_ID = 128


def json_response(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A response of ``content``; 429 and 503 say when to come again."""
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
    app.add_exception_handler(ServiceError, _answer)
    app.add_exception_handler(CodecError, _answer)
    app.add_exception_handler(RequestValidationError, _answer)
    app.add_exception_handler(HTTPException, _answer)
    app.add_exception_handler(ClientDisconnect, _answer)
    app.add_exception_handler(redis.exceptions.RedisError, _answer_for_redis)
    app.add_exception_handler(Exception, _answer)


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
    if isinstance(error, redis.exceptions.AuthenticationError):
        return ServiceError(
            "REDIS_UNAVAILABLE", "Redis does not take the gateway's password", retryable=False
        )
    if is_away(error):
        return ServiceError("REDIS_UNAVAILABLE", "Redis does not answer; try again shortly")
    return ServiceError(
        "INTERNAL", "something unexpected went wrong in the gateway; its log has the details"
    )
