"""JSON as the service writes it: strict, with non-finite numbers as strings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from nexrl_contract.errors import RETRY_AFTER_S
from nexrl_contract.names import JSON_TYPE, REQUEST_ID_HEADER
from starlette.responses import Response
from starlette.types import Message, Scope, Send

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


def json_bytes(content: Any) -> bytes:
    """Compact JSON; NaN and the infinities become "NaN", "Infinity" and "-Infinity"."""
    return json.dumps(finite(content), separators=(",", ":"), allow_nan=False).encode()


def finite(value: Any) -> Any:
    """``value`` with its non-finite floats as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {str(name): finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value
