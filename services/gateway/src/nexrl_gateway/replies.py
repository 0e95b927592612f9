"""JSON as the service writes it: strict, with non-finite numbers as strings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from nexrl_contract.errors import RETRY_AFTER_S
from nexrl_contract.names import JSON_TYPE
from starlette.responses import Response


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response of ``content``; 429 and 503 say when to come again."""
    again = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else {}
    return Response(json_bytes(content), status, {**again, **(headers or {})}, JSON_TYPE)


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
