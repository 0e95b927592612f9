"""What the OpenAPI page says about answers and errors, in one place."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from nexrl_contract.errors import ERRORS, RETRY_AFTER_S
from nexrl_contract.names import FRAME_TYPE, JSON_TYPE
from nexrl_contract.operations import Operation
from pydantic import BaseModel

from nexrl_gateway.examples import ERROR_EXAMPLES, OPERATION_ANSWERS, QUEUED

_NULL = "\0null"
Responses = dict[int | str, dict[str, Any]]

_CODES: defaultdict[int, list[str]] = defaultdict(list)
for _code, _kind in ERRORS.items():
    _CODES[_kind.status].append(_code)

FRAME: dict[str, Any] = {
    FRAME_TYPE: {
        "schema": {
            "type": "string",
            "format": "binary",
            "description": f"With `Accept: {FRAME_TYPE}`, where the result has tensors: a "
            "safetensors file "
            "of `batch`, "
            "with `metrics` and `meta_info` as JSON under `nexrl` in its metadata.",
        }
    }
}
"""The other form of a result with tensors."""
RETRY_AFTER: dict[str, Any] = {
    "Retry-After": {
        "description": "Seconds until the next try.",
        "schema": {"type": "integer"},
        "example": RETRY_AFTER_S,
    }
}


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


def errors(*statuses: int) -> Responses:
    """The ``responses`` of a route that may refuse with these statuses; 503 always."""
    return {status: _refusal(status) for status in (*statuses, 503)}


def answer(example: Any) -> Responses:
    """The ``responses`` of a route that answers such JSON."""
    return {200: {"description": "Done", "content": json_content(example)}}


def unavailable(example: Any) -> Responses:
    """503 of a route that reports on the service, whose answer is no error."""
    described = {"description": "Redis or the payload store is away", "headers": RETRY_AFTER}
    return {503: {**described, "content": json_content(example)}}


def operation_answers(operation: Operation) -> Responses:
    """What an operation answers when it is done, and when it is a job that goes on."""
    content = json_content(OPERATION_ANSWERS[operation.name]) | (
        FRAME if operation.takes_batch else {}
    )
    return {200: {"description": "Done", "content": content}, **accepted(operation.name)}


def operation_results() -> Responses:
    """What any operation has answered: the same as from the operation itself."""
    examples = {
        name: {"value": _replaced(example, None, _NULL)}
        for name, example in OPERATION_ANSWERS.items()
    }
    content = {JSON_TYPE: {"schema": {"type": "object"}, "examples": examples}, **FRAME}
    return {200: {"description": "Done", "content": content}}


def accepted(operation: str) -> Responses:
    """202: the job."""
    headers = {
        "Location": {
            "description": "Where to ask for the job.",
            "schema": {"type": "string"},
            "example": f"/jobs/{QUEUED['id']}",
        },
        "Preference-Applied": {"schema": {"type": "string"}, "example": "respond-async"},
    }
    description = "Accepted: the job, when the request prefers respond-async"
    content = json_content({**QUEUED, "operation": operation})
    return {202: {"description": description, "headers": headers, "content": content}}


def json_content(example: Any) -> dict[str, Any]:
    """A JSON object, by example."""
    return {JSON_TYPE: {"schema": {"type": "object"}, "example": _replaced(example, None, _NULL)}}


def with_nulls(page: dict[str, Any]) -> dict[str, Any]:
    """The finished page with the nulls of its examples, which FastAPI would have left out."""
    restored: dict[str, Any] = _replaced(page, _NULL, None)
    return restored


def _replaced(value: Any, old: Any, new: Any) -> Any:
    if isinstance(value, dict):
        return {name: _replaced(inner, old, new) for name, inner in value.items()}
    if isinstance(value, list):
        return [_replaced(inner, old, new) for inner in value]
    return new if value == old else value


def _refusal(status: int) -> dict[str, Any]:
    codes = _CODES[status]
    examples = {
        code: {"value": _replaced(ERROR_EXAMPLES[code], None, _NULL)}
        for code in codes
        if code in ERROR_EXAMPLES
    }
    response = {
        "model": ErrorBody,
        "description": ", ".join(codes),
        "content": {JSON_TYPE: {"examples": examples}},
    }
    return response | ({"headers": RETRY_AFTER} if status in (429, 503) else {})
