"""For the tests of trainers: a client whose service is a script.

Give ScriptedTransport the answers, then HTTPTrainServiceClient(transport=...); transport.requests
tells what was sent.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import tensor_codec
from nexrl_contract import envelope
from nexrl_contract.errors import RETRY_AFTER_S, ServiceError
from nexrl_contract.names import FRAME_TYPE, JSON_TYPE

from ._transport import Request, Response

__all__ = [
    "Answer",
    "Recorded",
    "ScriptedTransport",
    "error_response",
    "job_response",
    "json_response",
    "result_response",
]


@dataclass(frozen=True, slots=True)
class Recorded:
    """A request as it was sent, with its body's bytes and the time.monotonic() of its arrival."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    content: bytes
    at: float = field(default_factory=time.monotonic)

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.content)

    def frame(self) -> tensor_codec.Frame:
        """The body as a frame of tensors."""
        return tensor_codec.wrap(bytearray(self.content))


Answer: TypeAlias = Response | Exception | Callable[[Recorded], Response]


class ScriptedTransport:
    """Gives the answers in order, one a request, and keeps the requests. An exception is raised, a
    function is called.

    A request beyond the script is an AssertionError that names it.
    """

    def __init__(self, answers: Iterable[Answer]) -> None:
        self._answers = list(answers)
        self.requests: list[Recorded] = []
        self.closed = False

    def send(self, request: Request, silence_s: float) -> Response:
        """The next answer of the script."""
        content = b"".join(request.body or ())
        recorded = Recorded(
            request.method, request.path, dict(request.query), dict(request.headers), content
        )
        self.requests.append(recorded)
        if not self._answers:
            what = f"{request.method} {request.path}"
            raise AssertionError(f"the script has no answer left for {what}")
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, Response) else answer(recorded)

    def close(self) -> None:
        """Remember that the client was closed."""
        self.closed = True


def json_response(
    content: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """An answer of JSON."""
    lowered = {name.lower(): value for name, value in (headers or {}).items()}
    return Response(
        status,
        {"content-type": JSON_TYPE, **lowered},
        memoryview(bytearray(json.dumps(content).encode())),
    )


def result_response(
    tensors: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    meta_info: Mapping[str, Any] | None = None,
) -> Response:
    """The result of a batch operation, as a frame."""
    described = {"metrics": dict(metrics or {}), "meta_info": dict(meta_info or {})}
    frame = tensor_codec.encode(tensors or {}, envelope.written(described))
    return Response(200, {"content-type": FRAME_TYPE}, memoryview(bytearray(frame.tobytes())))


def job_response(
    job_id: str, operation: str = "update_actor", state: str = "queued", status: int = 202
) -> Response:
    """The record of a job: what an operation answers that has not ended in time."""
    return json_response({"id": job_id, "operation": operation, "state": state}, status)


def error_response(code: str, message: str = "", **details: Any) -> Response:
    """A refusal or failure with one of the service's codes; job_id=... makes it the end of that
    job."""
    error = ServiceError(code, message, **details)
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.kind.status in (429, 503) else {}
    return json_response({"error": error.body()}, error.kind.status, headers)
