"""One exchange, repeated until it is answered or its time is spent, and what the answer says: a
result as trainers get it, or an error."""

from __future__ import annotations

import contextlib
import json
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from email.utils import parsedate_to_datetime
from typing import Any

import tensor_codec
from nexrl_contract import envelope
from nexrl_contract.errors import ServiceError
from nexrl_contract.names import FRAME_TYPE

from ._tensors import data_to_tensor, frame_tensor
from ._transport import CONNECT_TIMEOUT_S, Request, Response, Transport
from .errors import (
    InvalidAnswer,
    ServiceFault,
    ServiceTimeout,
    StatusError,
    Unreachable,
    status_error,
)

MAX_WAIT_S = 25.0
MIN_CONNECT_S = 0.5
"""For a call whose time is spent, which asks once all the same."""
FIRST_BACK_OFF_S, MAX_BACK_OFF_S = 0.1, 5.0
_NON_FINITE = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


class Budget:
    """Seconds that one call may take, uploads not counted; None is no limit, but ends with
    ``within``.

    longest_wait_s is how long the service may hold one answer back.
    """

    def __init__(
        self,
        seconds: float | None,
        within: Budget | None = None,
        *,
        longest_wait_s: float = MAX_WAIT_S,
    ) -> None:
        self._total = math.inf if seconds is None else float(seconds)
        self._start = time.monotonic()
        self._within = within
        self.longest_wait_s = longest_wait_s

    @property
    def endless(self) -> bool:
        """Whether there is no limit."""
        return math.isinf(self._total)

    def exclude(self, seconds: float) -> None:
        """Do not count these seconds."""
        self._start += seconds

    def remaining(self) -> float:
        """Seconds left; 0 when spent, inf without a limit."""
        own = max(0.0, self._total - (time.monotonic() - self._start))
        return own if self._within is None else min(own, self._within.remaining())

    def spend(self) -> None:
        """Leave nothing: whoever still asks stops."""
        self._total = 0.0

    def wait_s(self) -> float:
        """How long the service may hold the next answer back."""
        return min(self.longest_wait_s, self.remaining())

    def connect_s(self) -> float:
        """How long the next connection may take to be made."""
        return min(CONNECT_TIMEOUT_S, max(MIN_CONNECT_S, self.remaining()))

    def silence_s(self) -> float:
        """How long to wait for the next answer: a busy host, which answers late, is no lost one."""
        return self.wait_s() + min(10.0, max(2.0, self._total / 4))


def exchange(transport: Transport, build: Callable[[float], Request], budget: Budget) -> Response:
    """The first 2xx answer; build makes the request from the seconds that its answer may be held
    back.

    Sends again after what may pass: lost connections, 408, 429, 502 to 504. Raises Unreachable,
    ServiceTimeout or the StatusError that was left when the budget was spent.
    """
    attempt = 0
    while True:
        try:
            return _once(transport, build(budget.wait_s()), budget)
        except (Unreachable, ServiceTimeout, StatusError) as error:
            delay = max(_back_off_s(attempt), error.details.get("retry_after_s", 0.0))
            if not _passes(error) or delay >= budget.remaining():
                raise
        time.sleep(delay)
        attempt += 1


def _once(transport: Transport, request: Request, budget: Budget) -> Response:
    try:
        request = replace(request, connect_s=budget.connect_s())
        response = transport.send(request, budget.silence_s())
    finally:
        if request.body is not None:
            budget.exclude(request.body.take_seconds())
    return checked(request, response)


def _passes(error: ServiceFault) -> bool:
    """Whether the same request may be answered otherwise in a while."""
    if not isinstance(error, StatusError):
        return True
    if error.job_id is not None:  # how that job ended; asking again does not change it
        return False
    if error.code is None:
        return error.status in (408, 429, 502, 503, 504)
    passing = error.status in (408, 429, 502, 503) or error.code == "CHECKSUM_MISMATCH"
    return passing and bool(error.details["retryable"])


def _back_off_s(attempt: int) -> float:
    longest = min(MAX_BACK_OFF_S, FIRST_BACK_OFF_S * 2 ** min(attempt, 10))
    return random.uniform(longest / 2, longest)


def read_json(response: Response) -> dict[str, Any]:
    """The JSON object of an answer; raises InvalidAnswer."""
    try:
        body = json.loads(bytes(response.body))
    except (ValueError, RecursionError) as error:
        start = bytes(response.body[:100])
        raise _not_the_service(response, f"what is no JSON ({start!r}...)") from error
    if not isinstance(body, dict):
        raise _not_the_service(response, f"a JSON {type(body).__name__}")
    return body


def read_result(response: Response, ignored: tuple[str, ...] = ()) -> dict[str, Any]:
    """An operation's answer: {"batch", "metrics", "meta_info"} of one that takes a batch, else its
    JSON object.

    meta_info["metrics"] is metrics. ``ignored`` joins what the service did not read. Metrics that
    are not finite are floats.
    """
    if response.headers.get("content-type", "").startswith(FRAME_TYPE):
        return _batch_result(*_read_frame(response), ignored)
    body = read_json(response)
    if "batch" not in body:
        return {**body, "metrics": _to_floats(body["metrics"])} if "metrics" in body else body
    try:
        batch = {name: data_to_tensor(data) for name, data in (body["batch"] or {}).items()}
    except (tensor_codec.CodecError, AttributeError) as error:
        raise InvalidAnswer(f"the answer holds a broken tensor: {error}") from error
    return _batch_result(batch, body.get("metrics"), body.get("meta_info"), ignored)


def checked(request: Request, response: Response) -> Response:
    """The response if it is 2xx, else raises what it says: a StatusError, or InvalidAnswer."""
    if 200 <= response.status < 300:
        return response
    raise _error_of(request, response)


def _not_the_service(response: Response, said: str) -> InvalidAnswer:
    return InvalidAnswer(f"{response.source} answered {said}; is this the service's address?")


def _read_frame(response: Response) -> tuple[dict[str, Any], Any, Any]:
    try:
        frame = tensor_codec.wrap(response.body)
        if envelope.FRAME_METADATA_KEY not in frame.header.metadata:
            raise _not_the_service(response, "tensors alone")
        described = envelope.read(frame.header.metadata)
        batch = {name: frame_tensor(frame, name) for name in frame.header.tensors}
        return batch, described.get("metrics"), described.get("meta_info")
    except (ValueError, ServiceError) as error:
        raise InvalidAnswer(f"the answer is a broken frame: {error}") from error


def _batch_result(
    batch: dict[str, Any], metrics: Any, meta_info: Any, ignored: tuple[str, ...]
) -> dict[str, Any]:
    meta = dict(meta_info) if isinstance(meta_info, Mapping) else {}
    floats = _to_floats(metrics if metrics is not None else meta.get("metrics") or {})
    names = list(dict.fromkeys([*ignored, *(meta.get("ignored") or [])]))
    meta_info = {**meta, "metrics": floats, "ignored": names}
    return {"batch": batch, "metrics": floats, "meta_info": meta_info}


def _to_floats(value: Any) -> Any:
    """The same metrics with "NaN", "Infinity" and "-Infinity" as floats, at any depth."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, list):
        return [_to_floats(item) for item in value]
    if isinstance(value, dict):
        return {name: _to_floats(item) for name, item in value.items()}
    return value


def _error_of(request: Request, response: Response) -> ServiceFault:
    if 300 <= response.status < 400:
        target = response.headers.get("location", "nowhere")
        return InvalidAnswer(
            f"{response.source} redirects {request.path} to {target}; give the client that address"
        )
    error = status_error(response.status, _error_body(request, response))
    if "retry-after" in response.headers:
        error.details["retry_after_s"] = _retry_after_s(response.headers["retry-after"])
    return error


def _error_body(request: Request, response: Response) -> dict[str, Any]:
    """The service's error object; of anything else (a proxy's page) who gave it, and its first
    characters."""
    text = bytes(response.body[:65536]).decode(errors="replace").strip()
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        body = json.loads(text)["error"]
        # Other gateways have an error object, too, but not our codes in it.
        if isinstance(body, dict) and isinstance(body.get("code"), str):
            return body
    kind = response.headers.get("content-type", "nothing").partition(";")[0]
    said = f": {' '.join(text[:200].split())}" if text else ""
    answered = f"{response.source} answered {request.method} {request.path}"
    return {
        "message": f"{answered} with {response.status} and {kind}, "
        f"which is no answer of the service{said}"
    }


def _retry_after_s(text: str) -> float:
    """Seconds of a Retry-After header, which may be a number or a date; 0 for what is neither."""
    with contextlib.suppress(ValueError):
        return max(0.0, float(text))
    with contextlib.suppress(ValueError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0
