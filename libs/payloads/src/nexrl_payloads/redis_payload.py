"""Reading rows of a payload out of Redis into kept memory."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Self

import redis
from tensor_codec import (
    FrameClosed,
    Header,
    InvalidRows,
    RawTensor,
    TensorInfo,
    UnknownTensor,
    header_length,
    parse_header,
)

from .common import as_malformed, not_found
from .protocol import Rows
from .redis_client import redis_errors
from .redis_records import Range, Record
from .redis_wire import receive_value

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from .arena import Arena, Loan

_HEADER_GUESS = 4096
_AHEAD_BYTES = 4 * 1024 * 1024
_AHEAD_COMMANDS = 64


class RedisPayload:
    """See :class:`nexrl_payloads.Payload`. ``arena`` lends the memory that tensors are read into."""

    def __init__(self, client: redis.Redis, record: Record, arena: Arena) -> None:
        self._client = client
        self._record = record
        self._header = _read_header(client, record)
        self._loan: Loan | None = arena.lend(record.nbytes, pieces=len(self._header.tensors))

    @property
    def header(self) -> Header:
        return self._header

    @property
    def nbytes(self) -> int:
        return self._record.nbytes

    def torch(self, name: str, rows: Rows = None) -> torch.Tensor:
        return self._read(name, rows).torch()

    def numpy(self, name: str, rows: Rows = None) -> NDArray[Any]:
        return self._read(name, rows).numpy()

    def close(self) -> None:
        """See the protocol; the memory is reused as soon as no tensor views it."""
        self._loan = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self, name: str, rows: Rows) -> RawTensor:
        if self._loan is None:
            raise FrameClosed(f"the payload was closed before tensor {name!a} was read; read it before")
        info = self._header.tensors.get(name)
        if info is None:
            raise UnknownTensor(f"the frame has no tensor {name!a}; it has {sorted(self._header.tensors)!a}")
        if rows is None:
            spans, shape = [(0, info.nbytes)], info.shape
        else:
            spans, shape = _row_spans(name, info, rows)
        start = self._header.data_start + info.start
        memory = self._loan.take(sum(stop - first for first, stop in spans))
        ranges = [found for first, stop in spans for found in self._record.ranges(start + first, start + stop)]
        _read_ranges(self._client, self._record.payload_id, ranges, memory)
        return RawTensor(info.dtype, shape, memory)


def fetch_bytes(client: redis.Redis, record: Record, start: int, end: int) -> bytes:
    """Bytes ``start`` to ``end`` (exclusive) of the payload. Raises PAYLOAD_NOT_FOUND if they have gone."""
    memory = bytearray(end - start)
    _read_ranges(client, record.payload_id, record.ranges(start, end), memoryview(memory))
    return bytes(memory)


def _read_ranges(client: redis.Redis, payload_id: str, ranges: Iterable[Range], memory: memoryview) -> None:
    """Put the ranges' bytes, one after another, into ``memory``.

    The next ranges are asked for before an answer is read, so that the server never waits.
    """
    with redis_errors():
        connection = client.connection_pool.get_connection()
        asked: deque[Range] = deque()
        ahead = position = 0

        def receive() -> None:
            nonlocal ahead, position
            nbytes = asked[0].nbytes
            if not receive_value(connection, memory[position : position + nbytes]):
                raise not_found(payload_id)
            asked.popleft()
            ahead -= nbytes
            position += nbytes

        try:
            for wanted in ranges:
                while asked and (ahead + wanted.nbytes > _AHEAD_BYTES or len(asked) == _AHEAD_COMMANDS):
                    receive()
                connection.send_command("GETRANGE", wanted.key, wanted.first, wanted.last)  # type: ignore[no-untyped-call]
                asked.append(wanted)
                ahead += wanted.nbytes
            while asked:
                receive()
        finally:
            if asked:  # answers are still on their way: the connection is of no use to anyone else
                connection.disconnect()  # type: ignore[no-untyped-call]
            client.connection_pool.release(connection)


def _read_header(client: redis.Redis, record: Record) -> Header:
    """One round trip for an ordinary header, a second for a longer one."""
    start = fetch_bytes(client, record, 0, min(_HEADER_GUESS, record.nbytes))
    with as_malformed(record.payload_id):
        length = header_length(start)
        if len(start) < length <= record.nbytes:
            start += fetch_bytes(client, record, len(start), length)
        return parse_header(start, record.nbytes)


def _row_spans(
    name: str, info: TensorInfo, rows: slice | Sequence[int]
) -> tuple[list[tuple[int, int]], tuple[int, ...]]:
    """Byte spans of the rows inside their tensor, neighbours joined, and the shape that they give."""
    if not info.shape:
        raise InvalidRows(f"tensor {name!a} has 0 dimensions, so it has no rows to choose from")
    count = info.shape[0]
    chosen = _row_numbers(name, rows, count)
    row_bytes = info.nbytes // count if count else 0
    spans: list[tuple[int, int]] = []
    for row in chosen:
        start = row * row_bytes
        if spans and spans[-1][1] == start:
            start = spans.pop()[0]
        spans.append((start, (row + 1) * row_bytes))
    return spans, (len(chosen), *info.shape[1:])


def _row_numbers(name: str, rows: slice | Sequence[int], count: int) -> Sequence[int]:
    """The rows as indices, by the rules of tensor_codec's Frame."""
    if isinstance(rows, slice):
        start, stop, step = rows.indices(count)
        if step < 1:
            raise InvalidRows(f"tensor {name!a} cannot be read with step {step}; give a step above 0, or a list")
        return range(start, stop, step)
    chosen = [operator.index(row) for row in rows]
    for row in chosen:
        if not 0 <= row < count:
            raise InvalidRows(f"tensor {name!a} has {count} rows; row {row} is not one of them")
    return chosen
