"""Reading a request's body: its kind, its size, and strict JSON."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, NoReturn

from anyio.to_thread import run_sync
from fastapi import Request
from nexrl_contract.errors import ServiceError
from nexrl_contract.names import FRAME_TYPE, JSON_TYPE

from nexrl_gateway.settings import JSON_LIMIT_BYTES


def content_kind(request: Request, *, frames: bool) -> str:
    """JSON_TYPE or FRAME_TYPE (where ``frames``); raises UNSUPPORTED_TYPE. A request without a body counts as JSON."""
    refuse_encoding(request)
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given == JSON_TYPE or (frames and given == FRAME_TYPE):
        return given
    if not given and not _has_body(request):
        return JSON_TYPE
    known = f"{JSON_TYPE} or {FRAME_TYPE}" if frames else JSON_TYPE
    raise ServiceError("UNSUPPORTED_TYPE", f"Content-Type {given[:100]!a} is not known here; send {known}")


def refuse_encoding(request: Request) -> None:
    """Raise UNSUPPORTED_TYPE for a compressed body."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise ServiceError(
            "UNSUPPORTED_TYPE", f"Content-Encoding {encoding[:100]!a} is not known here; send the body as it is"
        )


def declared_length(request: Request) -> int | None:
    """Bytes of the body as its header says, None for a chunked one."""
    text = request.headers.get("content-length")
    if text is None:
        return None
    if not text.isascii() or not text.isdigit():
        raise ServiceError("MALFORMED", f"Content-Length {text[:100]!a} is not a number")
    return int(text)


def pieces(request: Request, limit: int, advice: str) -> AsyncIterator[bytes]:
    """The body as it arrives; raises TOO_LARGE with ``advice`` above ``limit`` bytes.

    A declared length is judged by this call, not by the first piece: a body that is taken directly has none.
    """
    declared = declared_length(request)
    if declared is not None and declared > limit:
        raise _too_large(declared, limit, advice)
    return _limited(request, limit, advice)


async def _limited(request: Request, limit: int, advice: str) -> AsyncIterator[bytes]:
    seen = 0
    async for piece in request.stream():
        seen += len(piece)
        if seen > limit:
            raise _too_large(seen, limit, advice)
        if piece:
            yield piece


async def read_json(request: Request, limit: int = JSON_LIMIT_BYTES) -> dict[str, Any]:
    """The body's JSON object, {} for an empty body; raises TOO_LARGE or MALFORMED."""
    advice = f"send tensors as the binary frame ({FRAME_TYPE}) instead, as nexrl_client does"
    body = bytearray()
    async for piece in pieces(request, limit, advice):
        body += piece
    return await run_sync(_parse, bytes(body)) if body else {}


def _parse(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ServiceError("MALFORMED", f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(document, dict):
        raise ServiceError("MALFORMED", f"the body must be a JSON object, not {type(document).__name__}")
    return document


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f'{text} is not JSON; write the string "{text}"')


def _has_body(request: Request) -> bool:
    return "transfer-encoding" in request.headers or declared_length(request) not in (None, 0)


def _too_large(nbytes: int, limit: int, advice: str) -> ServiceError:
    return ServiceError(
        "TOO_LARGE", f"the body has {nbytes} bytes or more and the limit is {limit}; {advice}", limit=limit
    )
