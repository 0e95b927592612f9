"""Request bodies: which form one has, its pieces, JSON within bounds, and the forms of a batch in
it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

from anyio.to_thread import run_sync
from fastapi import Request
from nexrl_contract.batch import METADATA_SECTION, TENSOR_SECTION, VALUE_SECTION
from nexrl_contract.errors import ServiceError
from nexrl_contract.names import FRAME_TYPE, JSON_TYPE

from nexrl_gateway.direct import Pace
from nexrl_gateway.services import services_of
from nexrl_gateway.strict_json import parse_object

TENSORS_LIMIT_BYTES = 32 * 1024**2
"""Largest JSON body with a batch: what it holds is in memory twice over while it is read."""
CONTROL_LIMIT_BYTES = 1024**2
"""Largest JSON body of arguments alone."""
_WHOLE_BODY_S = 120
_PATIENCE_S = 20
_TENSOR_FIELDS = frozenset({"data", "shape", "dtype", "encoding"})
_AS_FRAME = f"send tensors as the binary frame ({FRAME_TYPE}) instead, as nexrl_client does"


def content_kind(request: Request, *, frames: bool) -> str:
    """JSON_TYPE or FRAME_TYPE (where ``frames``); raises UNSUPPORTED_TYPE. A request without a body
    counts as JSON."""
    refuse_encoding(request)
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given == JSON_TYPE or (frames and given == FRAME_TYPE):
        return given
    if not given and not _has_body(request):
        return JSON_TYPE
    known = f"{JSON_TYPE} or {FRAME_TYPE}" if frames else JSON_TYPE
    raise ServiceError(
        "UNSUPPORTED_TYPE", f"Content-Type {given[:100]!a} is not known here; send {known}"
    )


def refuse_encoding(request: Request) -> None:
    """Raise UNSUPPORTED_TYPE for a compressed body."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise ServiceError(
            "UNSUPPORTED_TYPE",
            f"Content-Encoding {encoding[:100]!a} is not known here; send the body as it is",
        )


def declared_length(request: Request) -> int | None:
    """Bytes of the body as its header says, None for a chunked one."""
    text = request.headers.get("content-length")
    if text is None:
        return None
    if not text.isascii() or not text.isdigit():
        raise ServiceError("MALFORMED", f"Content-Length {text[:100]!a} is not a number")
    return int(text)


def pieces(request: Request, limit: int, advice: str) -> AsyncGenerator[bytes]:
    """The body as it arrives; raises TOO_LARGE with ``advice`` above ``limit`` bytes, SLOW_REQUEST
    where it stops coming.

    A declared length is judged by this call, not by the first piece: a body that is taken directly
    has none.
    """
    declared = declared_length(request)
    if declared is not None and declared > limit:
        raise _too_large(declared, limit, advice)
    return _limited(request, limit, advice)


async def _limited(request: Request, limit: int, advice: str) -> AsyncGenerator[bytes]:
    stream, pace, seen = aiter(request.stream()), Pace(), 0
    while True:
        try:
            async with asyncio.timeout(pace.left_s()):
                piece = await anext(stream)
        except TimeoutError:
            raise pace.too_slow() from None
        except StopAsyncIteration:
            return
        pace.saw(len(piece))
        seen += len(piece)
        if seen > limit:
            raise _too_large(seen, limit, advice)
        if piece:
            yield piece


@contextlib.asynccontextmanager
async def json_body(request: Request, *, tensors: bool) -> AsyncIterator[dict[str, Any]]:
    """The body's JSON object, {} for an empty body, while there is room for it in memory: so use it
    within the block.

    Raises TOO_LARGE, MALFORMED, SLOW_REQUEST or GATEWAY_BUSY.
    """
    limit, advice = (
        (TENSORS_LIMIT_BYTES, _AS_FRAME)
        if tensors
        else (CONTROL_LIMIT_BYTES, "no argument takes so much")
    )
    arriving, room = pieces(request, limit, advice), services_of(request).room
    nbytes = limit if (declared := declared_length(request)) is None else declared
    async with _while_free(
        room.large_bodies if nbytes > CONTROL_LIMIT_BYTES else room.small_bodies
    ):
        body = bytearray()
        try:
            async with asyncio.timeout(_WHOLE_BODY_S):
                async for piece in arriving:
                    body += piece
            document = await run_sync(parse_object, body, limiter=room.parsing) if body else {}
        except TimeoutError:
            raise ServiceError(
                "SLOW_REQUEST", f"the JSON body did not come within {_WHOLE_BODY_S} s"
            ) from None
        finally:
            body.clear()  # an error on its way up would keep it
        yield document


@contextlib.asynccontextmanager
async def _while_free(places: asyncio.Semaphore) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(_PATIENCE_S):
            await places.acquire()
    except TimeoutError:
        raise ServiceError(
            "GATEWAY_BUSY", "too many JSON bodies are being read; try again shortly"
        ) from None
    try:
        yield
    finally:
        places.release()


def _has_body(request: Request) -> bool:
    return "transfer-encoding" in request.headers or declared_length(request) not in (None, 0)


def _too_large(nbytes: int, limit: int, advice: str) -> ServiceError:
    return ServiceError(
        "TOO_LARGE",
        f"the body has {nbytes} bytes or more and the limit is {limit}; {advice}",
        limit=limit,
    )


BATCH_KEYS = (*TENSOR_SECTION, *VALUE_SECTION, *METADATA_SECTION, "payload", "parts")
"""What a body with a batch may hold besides the operation's arguments."""


@dataclass(frozen=True, slots=True)
class BatchDocument:
    """A batch inside the request; ``values`` names what no operation reads, ``params`` has all
    other keys."""

    tensors: dict[str, Any]
    values: list[str]
    metadata: dict[str, Any]
    params: dict[str, Any]


@dataclass(frozen=True, slots=True)
class PartsDocument:
    """A batch that was uploaded before as ``parts`` parts of ``payload``; ``metadata`` is beside
    what its frame has."""

    payload: str
    parts: int
    values: list[str]
    metadata: dict[str, Any]
    params: dict[str, Any]


def read_batch(document: dict[str, Any]) -> BatchDocument | PartsDocument:
    """Tell the forms apart; raises INVALID_ARGUMENT naming the key that does not fit."""
    rest = dict(document)
    tensors = _take(rest, TENSOR_SECTION)
    values = list(_take(rest, VALUE_SECTION) or {})
    metadata = _take(rest, METADATA_SECTION) or {}
    if "payload" not in rest:
        if tensors is None:
            tensors = {name: rest.pop(name) for name in list(rest) if _is_tensor(rest[name])}
        return BatchDocument(tensors, values, metadata, rest)
    payload, parts = rest.pop("payload"), rest.pop("parts", None)
    if tensors:
        raise _invalid("payload", "send the tensors or the id of an uploaded payload, not both")
    if not isinstance(payload, str):
        raise _invalid("payload", "payload must be the id of an uploaded payload")
    if not isinstance(parts, int) or isinstance(parts, bool) or parts < 1:
        raise _invalid("parts", "parts must say how many parts were uploaded, from 1")
    return PartsDocument(payload, parts, values, metadata, rest)


def _take(rest: dict[str, Any], spellings: tuple[str, str]) -> dict[str, Any] | None:
    """Take a section out of the document, by either name."""
    found = [name for name in spellings if name in rest]
    if len(found) == 2:
        raise _invalid(found[1], f"{found[0]} and {found[1]} are two names of one thing; send one")
    if not found:
        return None
    value = rest.pop(found[0])
    if value is not None and not isinstance(value, dict):
        raise _invalid(found[0], f"{found[0]} must be an object, not {type(value).__name__}")
    return value


def _invalid(key: str, message: str) -> ServiceError:
    return ServiceError("INVALID_ARGUMENT", message, key=key)


def _is_tensor(value: Any) -> bool:
    """Whether somebody meant a tensor, well-formed or not: no argument is a list, or has one of
    these fields."""
    return isinstance(value, list) or (
        isinstance(value, dict) and not _TENSOR_FIELDS.isdisjoint(value)
    )
