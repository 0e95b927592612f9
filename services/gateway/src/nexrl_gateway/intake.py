"""Batches on their way into the store, and frames that lie there: checked by their header, then
streamed; memory stays flat."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import anyio
from anyio.to_thread import run_sync
from fastapi import Request
from nexrl_contract.envelope import FRAME_METADATA_KEY, Envelope
from nexrl_contract.errors import ServiceError
from nexrl_contract.records import PayloadRef
from nexrl_payloads import PartUpload, PayloadStore, StoredPayload, Upload
from tensor_codec import (
    ALIGNMENT,
    PREFIX_BYTES,
    CodecError,
    Header,
    RawTensor,
    encode,
    from_json,
    header_length,
    parse_header,
    to_json,
)

from nexrl_gateway.bodies import declared_length, pieces
from nexrl_gateway.direct import direct_body
from nexrl_gateway.services import Services
from nexrl_gateway.strict_json import parse_object

JOIN_BYTES = 1024 * 1024
_EXAMPLE = to_json(RawTensor("I64", (1, 2), struct.pack("<2q", 5, 7)))
Checked = TypeVar("Checked")


def envelope_of(header: Header) -> Envelope:
    """The envelope in a frame's header, empty for a plain safetensors file; raises MALFORMED."""

    def loads(text: str) -> dict[str, Any]:
        return parse_object(
            text.encode(), f"the frame's {FRAME_METADATA_KEY} metadata", constant=float
        )

    return Envelope.read(header.metadata, loads)


async def store_frame(
    request: Request,
    services: Services,
    payload_id: str,
    limit: int,
    check: Callable[[Header], Checked],
) -> tuple[Checked, StoredPayload]:
    """Stream the body into the store; ``check`` sees the header before anything is stored and may
    refuse by raising. It is called in a thread, as a header may be large.

    Raises TOO_LARGE, MALFORMED, NO_SPACE; whatever is raised, nothing stays in the store.
    """
    advice = "send it in parts (PUT /payloads/{id}/parts/{n}), as nexrl_client does"
    body = pieces(request, limit, advice)
    head = await _read_head(body)

    def parsed() -> tuple[Header, Checked]:
        header = parse_header(head, declared_length(request))
        return header, check(header)

    header, checked = await run_sync(parsed, limiter=services.room.parsing)
    if header.total_size > limit:
        raise ServiceError(
            "TOO_LARGE",
            f"the frame has {header.total_size} bytes and the limit is {limit}; {advice}",
            limit=limit,
        )
    upload = await run_sync(services.store.create, payload_id, header.total_size)
    try:
        await write_body(request, body, head, upload)
        return checked, await run_sync(upload.commit)
    finally:
        with anyio.CancelScope(shield=True):
            await run_sync(upload.abort)


def store_tensors(
    store: PayloadStore, payload_id: str, tensors: Mapping[str, RawTensor], envelope: Envelope
) -> StoredPayload:
    """Store tensors that came as JSON as the frame that a client would have sent."""
    return store.put(payload_id, encode(tensors, envelope.frame_metadata()))


def decode_tensors(entries: Mapping[str, Any]) -> dict[str, RawTensor]:
    """JSON tensors by name; raises MALFORMED naming the tensor."""
    return {name: _decode(name, entry) for name, entry in entries.items()}


def _decode(name: str, entry: Any) -> RawTensor:
    try:
        return from_json(entry)
    except CodecError as error:
        unlike = not isinstance(entry, dict) or entry.keys() != _EXAMPLE.keys()
        hint = (
            f'; in JSON tensors look so: {{"tensors": {json.dumps({name[:64]: _EXAMPLE})}}}'
            if unlike
            else ""
        )
        raise ServiceError("MALFORMED", f"tensor {name}: {error}{hint}", tensor=name) from None


async def _read_head(body: AsyncIterator[bytes]) -> bytearray:
    """The bytes read so far, the whole header among them unless the body ends before; raises
    CodecError."""
    head = bytearray()
    async for piece in body:
        head += piece
        if len(head) >= PREFIX_BYTES and len(head) >= header_length(head[:PREFIX_BYTES]):
            break
    return head


async def write_body(
    request: Request, body: AsyncGenerator[bytes], head: bytearray, upload: Upload | PartUpload
) -> None:
    """Write ``head`` and the rest of the body: straight from the connection where that can be, else
    as it arrives."""
    direct = direct_body(request)
    if direct is None:
        await _write_joined(body, head, upload)
    else:
        await body.aclose()  # it keeps its last piece
        await direct.copy(head, upload.write)


async def _write_joined(
    body: AsyncIterator[bytes], head: bytearray, upload: Upload | PartUpload
) -> None:
    """Write what arrives in joins of about 1 MiB, one being written while the next one arrives."""
    joined: list[bytes | bytearray] = [head]
    size = len(head)
    writing: asyncio.Task[None] | None = None
    try:
        async for piece in body:
            joined.append(piece)
            size += len(piece)
            if size < JOIN_BYTES:
                continue
            if writing is not None:
                await writing
            writing = asyncio.create_task(run_sync(upload.write, *joined))
            joined, size = [], 0
        if writing is not None:
            await writing
        await run_sync(upload.write, *joined)
    finally:
        if writing is not None:
            with anyio.CancelScope(shield=True):
                await asyncio.wait({writing})


@dataclass(frozen=True, slots=True)
class StoredFrame:
    """A frame being read: its header, and the bytes of its tensors in pieces, once."""

    header: Header
    body: Iterator[bytes]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.header.total_size - self.header.data_start


def read_frame(store: PayloadStore, ref: StoredPayload | PayloadRef) -> StoredFrame:
    """Begin to read a stored frame; raises PAYLOAD_NOT_FOUND, PAYLOAD_DAMAGED, or CodecError where
    it is no frame."""
    pieces = store.stream(ref.id, ref.checksum)
    head = b""
    for piece in pieces:
        head += piece
        if len(head) >= PREFIX_BYTES and len(head) >= header_length(head[:PREFIX_BYTES]):
            break
    header = parse_header(head)
    return StoredFrame(header, chain([head[header.data_start :]], pieces))


def header_bytes(header: Header, metadata: Mapping[str, str]) -> bytes:
    """The header of the same tensors with other metadata; raises CodecError where that is too
    large."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, info in header.tensors.items():
        entries[name] = {
            "dtype": info.dtype,
            "shape": info.shape,
            "data_offsets": [info.start, info.end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = len(text) + -(PREFIX_BYTES + len(text)) % ALIGNMENT
    head = length.to_bytes(PREFIX_BYTES, "little") + text.ljust(length)
    parse_header(head)
    return head


def store_with_metadata(
    store: PayloadStore, source: StoredPayload, target: str, metadata: Mapping[str, str]
) -> StoredPayload:
    """Store the frame ``source`` once more, as ``target`` with other metadata; memory stays
    flat."""
    frame = read_frame(store, source)
    head = header_bytes(frame.header, metadata)
    with store.create(target, len(head) + frame.nbytes) as upload:
        for piece in chain([head], frame.body):
            upload.write(piece)
        return upload.commit()
