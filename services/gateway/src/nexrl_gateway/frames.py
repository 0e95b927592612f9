"""Frames that lie in the store: their header, what follows it, and the same tensors under another header."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from nexrl_contract.records import PayloadRef
from nexrl_payloads import PayloadStore, StoredPayload
from tensor_codec import ALIGNMENT, PREFIX_BYTES, Header, header_length, parse_header


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
    """Begin to read a stored frame; raises PAYLOAD_NOT_FOUND, PAYLOAD_DAMAGED, or CodecError where it is no frame."""
    pieces = store.stream(ref.id, ref.checksum)
    head = b""
    for piece in pieces:
        head += piece
        if len(head) >= PREFIX_BYTES and len(head) >= header_length(head[:PREFIX_BYTES]):
            break
    header = parse_header(head)
    return StoredFrame(header, chain([head[header.data_start :]], pieces))


def header_bytes(header: Header, metadata: Mapping[str, str]) -> bytes:
    """The header of the same tensors with other metadata; raises CodecError where that is too large."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, info in header.tensors.items():
        entries[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [info.start, info.end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = len(text) + -(PREFIX_BYTES + len(text)) % ALIGNMENT
    head = length.to_bytes(PREFIX_BYTES, "little") + text.ljust(length)
    parse_header(head)
    return head


def store_with_metadata(
    store: PayloadStore, source: StoredPayload, target: str, metadata: Mapping[str, str]
) -> StoredPayload:
    """Store the frame ``source`` once more, as ``target`` with other metadata; memory stays flat."""
    frame = read_frame(store, source)
    head = header_bytes(frame.header, metadata)
    with store.create(target, len(head) + frame.nbytes) as upload:
        for piece in chain([head], frame.body):
            upload.write(piece)
        return upload.commit()
