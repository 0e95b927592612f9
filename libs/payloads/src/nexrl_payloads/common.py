"""What both stores share: ids, sums, refusals, and which bytes rows are."""

from __future__ import annotations

import operator
import re
import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TypeVar

import xxhash
from nexrl_contract.errors import ServiceError
from tensor_codec import CodecError, Header, InvalidRows, TensorInfo, UnknownTensor, header_length

from .protocol import RESULT_SUFFIX, Rows

PIECE = 1024 * 1024
"""Bytes of one piece of a stream."""

BLOCK = 16 * 1024
"""Bytes under one checksum. Larger ones are hardly faster, and a reader of rows reads whole
blocks."""

MAX_PARTS = 100_000
_LENGTH_BYTES = 8
_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,79}")
_CHECKSUM = re.compile(r"[0-9a-f]{32}")
Known = TypeVar("Known")


def is_id(text: str) -> bool:
    """Whether ``text`` may name a payload."""
    return _ID.fullmatch(text) is not None


def check_id(payload_id: str) -> str:
    """Return the id, or raise INVALID_ARGUMENT: an id is a file's name, so it must not lead
    anywhere else."""
    if not is_id(payload_id):
        raise ServiceError(
            "INVALID_ARGUMENT",
            (
                f"payload id {payload_id[:100]!a} is not valid: use 1 to 80 of A-Z a-z 0-9 _ . - "
                "without a leading dot"
            ),
        )
    return payload_id


def check_part(n: int) -> int:
    """Return the part's number, or raise INVALID_ARGUMENT."""
    if not 0 <= n < MAX_PARTS:
        raise ServiceError(
            "INVALID_ARGUMENT", f"part {n} is not between 0 and {MAX_PARTS - 1}", part=n
        )
    return n


def check_count(payload_id: str, present: Sequence[int], count: int) -> None:
    """Raise INVALID_ARGUMENT unless the parts present are exactly 0 to ``count - 1``."""
    if not 1 <= count <= MAX_PARTS:
        raise ServiceError(
            "INVALID_ARGUMENT", f"parts must be between 1 and {MAX_PARTS}, not {count}"
        )
    missing = sorted(set(range(count)) - set(present))
    if missing:
        more = ", ..." if len(missing) > 20 else ""
        named = ", ".join(map(str, missing[:20])) + more
        raise ServiceError(
            "INVALID_ARGUMENT",
            (
                f"payload {payload_id} lacks part {named} of {count}: send it with PUT "
                f"/payloads/{payload_id}/parts/N"
            ),
            missing=missing[:20],
        )
    if len(present) > count:
        raise ServiceError(
            "INVALID_ARGUMENT",
            f"payload {payload_id} has {len(present)} parts, not {count}: say how many were sent",
        )


def same_part(payload_id: str, n: int, known: Known, sent: Known) -> None:
    """Raise INVALID_ARGUMENT if a part that is there was sent again with other content."""
    if known != sent:
        raise ServiceError(
            "INVALID_ARGUMENT",
            (
                f"part {n} of payload {payload_id} is already there with other bytes: use a new "
                "payload id"
            ),
            part=n,
        )


def not_found(payload_id: str) -> ServiceError:
    """The refusal for a payload that is not there."""
    return ServiceError(
        "PAYLOAD_NOT_FOUND",
        f"payload {payload_id} is not there: it was never sent, has expired or was deleted",
    )


def age_limit(payload_id: str, result_age_s: float, upload_age_s: float) -> float:
    """Seconds after which nobody needs the payload."""
    return result_age_s if payload_id.endswith(RESULT_SUFFIX) else upload_age_s


@contextmanager
def as_malformed(payload_id: str) -> Iterator[None]:
    """Turn the codec's refusals of a frame into MALFORMED."""
    try:
        yield
    except CodecError as error:
        raise ServiceError(
            "MALFORMED", f"payload {payload_id} is no sound frame: {error}"
        ) from error


class Tally:
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

    def finish(self) -> None:
        """All has been added. Raises MALFORMED below the announced length."""
        if self._announced is not None and self.nbytes != self._announced:
            raise ServiceError(
                "MALFORMED",
                f"{self._what} ended after {self.nbytes} of {self._announced} bytes announced",
            )

    def verify(self, claimed: str | None) -> None:
        """Raise CHECKSUM_MISMATCH unless the sender's checksum, where there is one, is that of the
        bytes."""
        if claimed is None:
            return
        if _CHECKSUM.fullmatch(claimed.lower()) is None:
            raise ServiceError(
                "INVALID_ARGUMENT",
                f"the checksum of {self._what} must be 32 hex digits of xxh3-128",
            )
        if self._whole is None or claimed.lower() != self._whole.hexdigest():
            raise ServiceError(
                "CHECKSUM_MISMATCH",
                f"{self._what} arrived with other bytes than were sent: send it again",
            )

    @property
    def checksum(self) -> str:
        """The xxh3-128 hex of all bytes, of a tally of ``whole`` bytes."""
        assert self._whole is not None
        return str(self._whole.hexdigest())

    def sums(self) -> bytes:
        """The checksums of the blocks, as :class:`Sums` reads them."""
        digests = self._digests[:]
        if self.nbytes % BLOCK:
            digests.append(self._begun.intdigest())
        return self.nbytes.to_bytes(_LENGTH_BYTES, "little") + _little_endian(digests).tobytes()

    def _hash_blocks(self, chunk: memoryview) -> None:
        position = 0
        while position < chunk.nbytes:
            filled = self.nbytes % BLOCK
            piece = chunk[position : position + BLOCK - filled]
            position += piece.nbytes
            self.nbytes += piece.nbytes
            if piece.nbytes == BLOCK:
                self._digests.append(xxhash.xxh3_64_intdigest(piece))
                continue
            self._begun.update(piece)
            if self.nbytes % BLOCK == 0:
                self._digests.append(self._begun.intdigest())
                self._begun.reset()


class Sums:
    """The checksums of a payload's blocks: its parts' tables, joined in order. Each part begins a
    new block.

    A table is the part's bytes and the xxh3-64 of each of its blocks, in 8 little-endian bytes
    each. What names the payload carries the checksum of all tables, so bytes and tables cannot both
    go wrong unseen.
    """

    def __init__(self, payload_id: str, tables: bytes, checksum: str) -> None:
        if sums_checksum(tables) != checksum:
            raise damaged(payload_id, "the checksums beside it")
        self.payload_id = payload_id
        self.borders = [0]
        digests = array("Q")
        position = 0
        while position < len(tables):
            start = self.borders[-1]
            end = start + int.from_bytes(tables[position : position + _LENGTH_BYTES], "little")
            self.borders += range(start + BLOCK, end, BLOCK)
            if end > start:
                self.borders.append(end)
            position += _LENGTH_BYTES
            stop = position + 8 * (len(self.borders) - 1 - len(digests))
            digests.frombytes(tables[position:stop])
            position = stop
        self._digests = _little_endian(digests)

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return self.borders[-1]

    def covering(self, start: int, end: int) -> range:
        """The blocks that hold bytes ``start`` to ``end`` (exclusive); block n begins at
        ``borders[n]``."""
        if start >= end:
            return range(0)
        return range(bisect_right(self.borders, start) - 1, bisect_left(self.borders, end))

    def check(self, block: int, data: memoryview, header: Header | None = None) -> None:
        """Raise PAYLOAD_DAMAGED, naming what of ``header`` the block holds, unless ``data`` are its
        bytes."""
        if xxhash.xxh3_64_intdigest(data) != self._digests[block]:
            start, end = self.borders[block : block + 2]
            what = f"{_contents(header, start, end)} (bytes {start} to {end - 1})"
            raise damaged(self.payload_id, what, block=block, **_place(header, start))


def verified_head(sums: Sums, read: Callable[[int, int], memoryview]) -> bytes:
    """Prefix and JSON of a frame, after checking the blocks that hold them; raises CodecError for
    their length."""
    head = b""
    for block, (start, end) in enumerate(pairwise(sums.borders)):
        data = read(start, end)
        sums.check(block, data)
        head += data
        if end >= header_length(head):
            break
    return head


def verified_pieces(sums: Sums, read: Callable[[int, int], bytes]) -> Iterator[bytes]:
    """All bytes in pieces of about 1 MiB, each checked before it is given."""
    start = 0
    while start < sums.nbytes:
        blocks = sums.covering(start, min(start + PIECE, sums.nbytes))
        end = sums.borders[blocks.stop]
        data = read(start, end)
        piece = memoryview(data)
        for block in blocks:
            sums.check(block, piece[sums.borders[block] - start : sums.borders[block + 1] - start])
        yield data
        start = end


def sums_checksum(tables: bytes) -> str:
    """What stands for a payload's bytes: equal payloads that came in equal parts have equal
    ones."""
    return str(xxhash.xxh3_128_hexdigest(tables))


def damaged(payload_id: str, what: str, **details: object) -> ServiceError:
    """The refusal of bytes that are no longer those that were stored."""
    return ServiceError(
        "PAYLOAD_DAMAGED",
        f"{what} of payload {payload_id} changed while it was stored, on disk, in memory or in "
        "Redis: nothing of the "
        "batch was applied, send it again",
        **details,
    )


def row_spans(
    name: str, header: Header, rows: Rows
) -> tuple[TensorInfo, list[tuple[int, int]], tuple[int, ...]]:
    """A tensor, the bytes of its rows inside the frame (neighbours joined), and the shape that they
    give."""
    info = header.tensors.get(name)
    if info is None:
        raise UnknownTensor(f"the frame has no tensor {name!a}; it has {sorted(header.tensors)!a}")
    base = header.data_start + info.start
    if rows is None:
        return info, [(base, base + info.nbytes)], info.shape
    if not info.shape:
        raise InvalidRows(f"tensor {name!a} has 0 dimensions, so it has no rows to choose from")
    count = info.shape[0]
    chosen = _row_numbers(name, rows, count)
    row_bytes = info.nbytes // count if count else 0
    spans: list[tuple[int, int]] = []
    for row in chosen:
        start = base + row * row_bytes
        if spans and spans[-1][1] == start:
            start = spans.pop()[0]
        spans.append((start, base + (row + 1) * row_bytes))
    return info, spans, (len(chosen), *info.shape[1:])


def _row_numbers(name: str, rows: slice | Sequence[int], count: int) -> Sequence[int]:
    """The rows as indices, by the rules of tensor_codec's Frame."""
    if isinstance(rows, slice):
        start, stop, step = rows.indices(count)
        if step < 1:
            raise InvalidRows(
                f"tensor {name!a} cannot be read with step {step}; give a step above 0, or a list"
            )
        return range(start, stop, step)
    chosen = [operator.index(row) for row in rows]
    for row in chosen:
        if not 0 <= row < count:
            raise InvalidRows(f"tensor {name!a} has {count} rows; row {row} is not one of them")
    return chosen


def _contents(header: Header | None, start: int, end: int) -> str:
    """What bytes of a frame hold, in words."""
    if header is None:  # it is what cannot be trusted
        return "the header or the rows behind it"
    held = ["the header"] if start < header.data_start else []
    for name, info in header.tensors.items():
        first = max(start - header.data_start, info.start)
        stop = min(end - header.data_start, info.end)
        if first < stop:
            held.append(f"tensor {name}{_rows_text(info, first - info.start, stop - info.start)}")
    return ", ".join(held)


def _rows_text(info: TensorInfo, start: int, end: int) -> str:
    if not info.shape:
        return ""
    row_bytes = info.nbytes // info.shape[0]
    first, last = start // row_bytes, (end - 1) // row_bytes
    return f" row {first}" if first == last else f" rows {first} to {last}"


def _place(header: Header | None, start: int) -> dict[str, object]:
    """The first tensor and row that bytes of a frame hold, for programs."""
    if header is None or start < header.data_start:
        return {}
    position = start - header.data_start
    for name, info in header.tensors.items():
        if info.start <= position < info.end:
            row_bytes = info.nbytes // info.shape[0] if info.shape else 0
            return {
                "tensor": name,
                "row": (position - info.start) // row_bytes if row_bytes else None,
            }
    return {}


def _little_endian(digests: array[int]) -> array[int]:
    """The same array on a little-endian machine, on another one with the bytes of each number
    turned round."""
    if sys.byteorder == "big":
        digests = digests[:]
        digests.byteswap()
    return digests


def byte_views(chunks: Sequence[bytes | bytearray | memoryview]) -> list[memoryview]:
    """The non-empty chunks as flat views of bytes."""
    return [memoryview(chunk).cast("B") for chunk in chunks if memoryview(chunk).nbytes]
