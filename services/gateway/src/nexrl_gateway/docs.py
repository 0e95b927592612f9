"""What the OpenAPI page says about errors, in one place."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from nexrl_contract.errors import ERRORS, ServiceError
from pydantic import BaseModel

_CODES: defaultdict[int, list[str]] = defaultdict(list)
for _code, _kind in ERRORS.items():
    _CODES[_kind.status].append(_code)


class ErrorDetail(BaseModel):
    """What went wrong; further fields (tensor, row, key, nearest, ...) say where."""

    code: str
    message: str
    retryable: bool
    identifier: str | None
    job_id: str | None
    rank: int | None


class ErrorBody(BaseModel):
    """The one shape of every error."""

    error: ErrorDetail


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route that may refuse with these statuses; 503 always."""
    return {status: _response(status) for status in (*statuses, 503)}


def _response(status: int) -> dict[str, Any]:
    codes = _CODES[status]
    example = {"error": ServiceError(codes[0], "what is wrong, and what to do about it").body()}
    content = {"application/json": {"example": example}}
    return {"model": ErrorBody, "description": ", ".join(codes), "content": content}
