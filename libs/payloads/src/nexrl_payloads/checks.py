"""Checksums of a payload's blocks: made while its bytes come in, compared with what readers get.

Each part of a payload has a table: its bytes and the xxh3-64 of each of its blocks, as
little-endian 64-bit numbers. The tables of all parts, joined in order, lie beside the payload. What
names the payload carries the xxh3-128 of all tables: so bytes and tables cannot both go wrong
unseen.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import xxhash
from nexrl_contract.errors import ServiceError
from tensor_codec import PREFIX_BYTES, Header, header_length

PIECE = 1024 * 1024
"""Bytes of one piece of a stream."""

BLOCK = 16 * 1024
"""Bytes under one checksum. Larger ones are hardly faster, and a reader of rows reads whole
blocks."""

_LENGTH_BYTES = _DIGEST_BYTES = 8
_CHECKSUM = re.compile(r"[0-9a-f]{32}")
Read = Callable[[int, int], bytes | memoryview]
"""Gives bytes ``start`` to ``end`` (exclusive) of a payload."""


class BlockHasher:
    """Counts and hashes what is written, and holds it against the length that was announced.

    ``whole`` also makes the xxh3-128 of all bytes, for a sender's checksum to be compared with.
    """

    def __init__(self, what: str, announced: int | None, *, whole: bool = False) -> None:
        self.nbytes = 0
        self._what = what
        self._announced = announced
        self._whole = xxhash.xxh3_128() if whole else None
        self._digests = array("Q")
        self._begun = xxhash.xxh3_64()

    def add(self, chunks: Sequence[memoryview]) -> None:
        """Take chunks into account before they are written. Raises MALFORMED above the announced
        length."""
        for chunk in chunks:
            self._hash_blocks(chunk)
            if self._whole is not None:
                self._whole.update(chunk)
        if self._announced is not None and self.nbytes > self._announced:
            raise ServiceError(
                "MALFORMED", f"{self._what} is longer than the {self._announced} bytes announced"
            )

    def finish(self, claimed: str | None = None) -> None:
        """All has been added. Raises MALFORMED below the announced length, and CHECKSUM_MISMATCH
        unless ``claimed``, the sender's checksum where there is one, is that of the bytes."""
        if self._announced is not None and self.nbytes != self._announced:
            raise ServiceError(
                "MALFORMED",
                f"{self._what} ended after {self.nbytes} of {self._announced} bytes announced",
            )
        if claimed is None:
            return
        if _CHECKSUM.fullmatch(claimed.lower()) is None:
            raise ServiceError(
                "INVALID_ARGUMENT",
                f"the checksum of {self._what} must be 32 hex digits of xxh3-128",
            )
        if claimed.lower() != self.checksum:
            raise ServiceError(
                "CHECKSUM_MISMATCH",
                f"{self._what} arrived with other bytes than were sent: send it again",
            )

    @property
    def checksum(self) -> str:
        """The xxh3-128 hex of all bytes, where it is made."""
        return "" if self._whole is None else str(self._whole.hexdigest())

    def table(self) -> bytes:
        """The checksums of the blocks, as :class:`BlockChecksums` reads them."""
        digests = self._digests[:]
        if self.nbytes % BLOCK:
            digests.append(self._begun.intdigest())
        return self.nbytes.to_bytes(_LENGTH_BYTES, "little") + digests.tobytes()

    def _hash_blocks(self, chunk: memoryview) -> None:
        position = 0
        while position < chunk.nbytes:
            piece = chunk[position : position + BLOCK - self.nbytes % BLOCK]
            position += piece.nbytes
            self.nbytes += piece.nbytes
            if piece.nbytes == BLOCK:
                self._digests.append(xxhash.xxh3_64_intdigest(piece))
                continue
            self._begun.update(piece)
            if self.nbytes % BLOCK == 0:
                self._digests.append(self._begun.intdigest())
                self._begun.reset()


class BlockChecksums:
    """The checksums of the blocks of one payload; block n is bytes ``borders[n]`` to ``borders[n +
    1]``, and each part begins a new one."""

    def __init__(self, payload_id: str, tables: bytes, checksum: str, nbytes: int) -> None:
        """Raises PAYLOAD_DAMAGED unless the tables have ``checksum`` and are those of ``nbytes``
        bytes."""
        if tables_checksum(tables) != checksum:
            raise damaged(payload_id, "the checksums beside it")
        self.payload_id = payload_id
        self.borders = [0]
        self._digests = array("Q")
        position = 0
        while position < len(tables):
            start = self.borders[-1]
            end = start + int.from_bytes(tables[position : position + _LENGTH_BYTES], "little")
            self.borders += range(start + BLOCK, end, BLOCK)
            if end > start:
                self.borders.append(end)
            position += _LENGTH_BYTES
            stop = position + _DIGEST_BYTES * (len(self.borders) - 1 - len(self._digests))
            self._digests.frombytes(tables[position:stop])
            position = stop
        self.nbytes = self.borders[-1]
        if self.nbytes != nbytes:
            raise damaged(payload_id, f"the length ({nbytes} bytes now, {self.nbytes} stored)")

    def covering(self, start: int, end: int) -> range:
        """The blocks that hold bytes ``start`` to ``end`` (exclusive)."""
        if start >= end:
            return range(0)
        return range(bisect_right(self.borders, start) - 1, bisect_left(self.borders, end))

    def check(self, block: int, data: bytes | memoryview, header: Header | None = None) -> None:
        """Raise PAYLOAD_DAMAGED, naming what of ``header`` the block holds, unless ``data`` are its
        bytes."""
        if xxhash.xxh3_64_intdigest(data) != self._digests[block]:
            start, end = self.borders[block : block + 2]
            what, details = _contents(header, start, end)
            where = f"{what} (bytes {start} to {end - 1})"
            raise damaged(self.payload_id, where, block=block, **details)

    def check_span(self, start: int, data: memoryview, header: Header | None = None) -> None:
        """As :meth:`check` for whole neighbouring blocks, of which the first begins at
        ``start``."""
        for block in self.covering(start, start + data.nbytes):
            first, stop = self.borders[block : block + 2]
            self.check(block, data[first - start : stop - start], header)

    def head(self, read: Read) -> bytes:
        """Prefix and JSON of a frame, after checking the blocks that hold them; raises CodecError
        for their length."""
        head = b""
        for block, (start, end) in enumerate(pairwise(self.borders)):
            data = read(start, end)
            self.check(block, data)
            head += data
            if end >= PREFIX_BYTES and end >= header_length(head):
                break
        return head


def pieces(nbytes: int, read: Read, checksums: BlockChecksums | None) -> Iterator[bytes]:
    """All bytes of a payload in pieces of about 1 MiB; with ``checksums``, each is checked before
    it is given."""
    start = 0
    while start < nbytes:
        end = min(start + PIECE, nbytes)
        if checksums is not None:
            end = checksums.borders[checksums.covering(start, end).stop]
        piece = bytes(read(start, end))
        if checksums is not None:
            checksums.check_span(start, memoryview(piece).toreadonly())
        yield piece
        start = end


def tables_checksum(tables: bytes) -> str:
    """What stands for a payload's bytes: equal payloads that came in equal parts have equal
    ones."""
    return str(xxhash.xxh3_128_hexdigest(tables))


def damaged(payload_id: str, what: str, **details: object) -> ServiceError:
    """The refusal of bytes that are no longer those that were stored."""
    return ServiceError(
        "PAYLOAD_DAMAGED",
        f"{what} of payload {payload_id} changed while it was stored, on disk, in memory or in "
        "Redis: nothing of the batch was applied, send it again",
        **details,
    )


def _contents(header: Header | None, start: int, end: int) -> tuple[str, dict[str, object]]:
    """What bytes of a frame hold: in words, and the first tensor and row for programs."""
    if header is None:  # it is what cannot be trusted
        return "the header or the rows behind it", {}
    held = ["the header"] if start < header.data_start else []
    details: dict[str, object] = {}
    for name, info in header.tensors.items():
        first = max(start - header.data_start, info.start) - info.start
        last = min(end - header.data_start, info.end) - info.start - 1
        if first > last:
            continue
        row, rows = None, ""
        if info.shape:
            row_bytes = info.nbytes // info.shape[0]
            row, last_row = first // row_bytes, last // row_bytes
            rows = f" row {row}" if row == last_row else f" rows {row} to {last_row}"
        held.append(f"tensor {name}{rows}")
        if info.start + first == start - header.data_start:
            details = {"tensor": name, "row": row}
    return ", ".join(held), details
