"""Frames and parts on their way from a request into the payload store, and stored frames that are
read again. The gateway's memory stays flat, whatever their size."""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
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
    PREFIX_BYTES,
    CodecError,
    Header,
    RawTensor,
    from_json,
    header_length,
    parse_header,
    to_json,
)

from nexrl_gateway.bodies import declared_length, pieces, refuse_encoding
from nexrl_gateway.direct import direct_body
from nexrl_gateway.services import Services
from nexrl_gateway.strict_json import parse_object

_JOINED_BYTES = 1024 * 1024
_EXAMPLE = to_json(RawTensor("I64", (1, 2), struct.pack("<2q", 5, 7)))
Checked = TypeVar("Checked")
Stored = TypeVar("Stored")


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
    head = bytearray()
    async for piece in body:
        head += piece
        if _has_header(head):
            break

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
    return checked, await _store(request, body, head, upload, upload.commit)


async def store_part(
    services: Services, request: Request, payload_id: str, part: int, checksum: str
) -> int:
    """Stream the body as one part and return its bytes; raises TOO_LARGE, CHECKSUM_MISMATCH or
    NO_SPACE."""
    refuse_encoding(request)
    body = pieces(request, services.settings.max_body_bytes, "send smaller parts")
    upload = await run_sync(services.store.put_part, payload_id, part, declared_length(request))
    return await _store(request, body, bytearray(), upload, lambda: upload.commit(checksum))


async def _store(
    request: Request,
    body: AsyncGenerator[bytes],
    head: bytearray,
    upload: Upload | PartUpload,
    commit: Callable[[], Stored],
) -> Stored:
    """Write ``head`` and the rest of the body, straight from the connection where that can be, else
    in joins of about 1 MiB; then commit. Whatever is raised, nothing stays."""
    try:
        direct = direct_body(request)
        if direct is not None:
            await body.aclose()  # it keeps its last piece
            await direct.copy(head, upload.write)
        else:
            async for piece in body:
                head += piece
                if len(head) >= _JOINED_BYTES:
                    await run_sync(upload.write, head)
                    head.clear()
            await run_sync(upload.write, head)
        return await run_sync(commit)
    finally:
        # The client may have gone, and this task been cancelled: what was written must go too.
        with anyio.CancelScope(shield=True):
            await run_sync(upload.abort)


def decode_tensors(entries: Mapping[str, Any]) -> dict[str, RawTensor]:
    """JSON tensors by name; raises MALFORMED naming the tensor."""
    found = {}
    for name, entry in entries.items():
        try:
            found[name] = from_json(entry)
        except CodecError as error:
            hint = ""
            if not isinstance(entry, dict) or entry.keys() != _EXAMPLE.keys():
                example = json.dumps({name[:64]: _EXAMPLE})
                hint = f'; in JSON tensors look so: {{"tensors": {example}}}'
            message = f"tensor {name}: {error}{hint}"
            raise ServiceError("MALFORMED", message, tensor=name) from None
    return found


def envelope_of(header: Header) -> Envelope:
    """The envelope in a frame's header, empty for a plain safetensors file; raises MALFORMED."""
    what = f"the frame's {FRAME_METADATA_KEY} metadata"
    return Envelope.read(
        header.metadata, lambda text: parse_object(text.encode(), what, constant=float)
    )


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
    stream = store.stream(ref.id, ref.checksum)
    head = b""
    for piece in stream:
        head += piece
        if _has_header(head):
            break
    header = parse_header(head)
    return StoredFrame(header, chain([head[header.data_start :]], stream))


def store_with_metadata(
    store: PayloadStore, source: StoredPayload, target: str, metadata: Mapping[str, str]
) -> StoredPayload:
    """Store the frame ``source`` once more, as ``target`` with other metadata."""
    frame = read_frame(store, source)
    head = frame.header.with_metadata(metadata)
    with store.create(target, len(head) + frame.nbytes) as upload:
        for piece in chain([head], frame.body):
            upload.write(piece)
        return upload.commit()


def _has_header(head: bytes | bytearray) -> bool:
    """Whether the bytes hold a frame's whole header; raises CodecError for its length."""
    return len(head) >= PREFIX_BYTES and len(head) >= header_length(head[:PREFIX_BYTES])
