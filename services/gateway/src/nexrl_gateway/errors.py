"""From whatever goes wrong to the one error body of the service; nothing internal leaks."""

from __future__ import annotations

import redis
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from nexrl_contract.config import argument_error
from nexrl_contract.errors import ServiceError
from nexrl_ledger import is_away
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from tensor_codec import CodecError

from nexrl_gateway.replies import json_response

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
