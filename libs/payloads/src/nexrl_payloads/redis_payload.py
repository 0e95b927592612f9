"""Reading rows of a payload out of Redis into kept memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Self

import redis
from tensor_codec import (
    FrameClosed,
    Header,
    RawTensor,
    header_length,
    parse_header,
)

from .common import Sums, as_malformed, not_found, row_spans, verified_head
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
    """See :class:`nexrl_payloads.Payload`. ``arena`` lends the memory that tensors are read
    into."""

    def __init__(
        self, client: redis.Redis, record: Record, arena: Arena, sums: Sums | None
    ) -> None:
        self._client = client
        self._record = record
        self._sums = sums
        self._header = _read_header(client, record, sums)
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

    def check(self, name: str, rows: Rows = None) -> None:
        if self._sums is not None:
            self._read(name, rows)

    def close(self) -> None:
        """See the protocol; the memory is reused as soon as no tensor views it."""
        self._loan = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self, name: str, rows: Rows) -> RawTensor:
        if self._loan is None:
            raise FrameClosed(
                f"the payload was closed before tensor {name!a} was read; read it before"
            )
        info, spans, shape = row_spans(name, self._header, rows)
        memory = self._loan.take(sum(stop - first for first, stop in spans))
        if self._sums is None:
            self._fetch(spans, memory)
        else:
            self._fetch_sound(self._sums, spans, memory)
        return RawTensor(info.dtype, shape, memory)

    def _fetch(self, spans: list[tuple[int, int]], memory: memoryview) -> None:
        targets, place = [], 0
        for first, stop in spans:
            targets.append((first, memory[place : place + stop - first]))
            place += stop - first
        _read_into(self._client, self._record, targets)

    def _fetch_sound(self, sums: Sums, spans: list[tuple[int, int]], memory: memoryview) -> None:
        """Fetch whole blocks, check them, and put the spans' bytes into ``memory``.

        The inner blocks of a span are fetched into their place, those at its ends, which hold
        others' bytes too, beside.
        """
        targets: list[tuple[int, memoryview]] = []
        checks: list[tuple[int, memoryview]] = []
        beside: dict[int, memoryview] = {}
        copies: list[tuple[memoryview, memoryview]] = []
        place = 0
        for first, stop in spans:
            to = place - first
            inner = []
            for block in sums.covering(first, stop):
                start, end = sums.borders[block : block + 2]
                if first <= start and end <= stop:
                    inner.append((start, end))
                    checks.append((block, memory[to + start : to + end]))
                    continue
                if block not in beside:
                    beside[block] = memoryview(bytearray(end - start))
                    targets.append((start, beside[block]))
                mine = slice(max(first, start) - start, min(stop, end) - start)
                copies.append(
                    (memory[to + start + mine.start : to + start + mine.stop], beside[block][mine])
                )
            if inner:
                targets.append((inner[0][0], memory[to + inner[0][0] : to + inner[-1][1]]))
            place += stop - first
        _read_into(self._client, self._record, targets)
        for block, data in [*checks, *beside.items()]:
            sums.check(block, data, self._header)
        for target, source in copies:
            target[:] = source


def fetch_bytes(client: redis.Redis, record: Record, start: int, end: int) -> bytes:
    """Bytes ``start`` to ``end`` (exclusive) of the payload. Raises PAYLOAD_NOT_FOUND if they have
    gone."""
    memory = bytearray(end - start)
    _read_into(client, record, [(start, memoryview(memory))])
    return bytes(memory)


def _read_into(
    client: redis.Redis, record: Record, targets: Iterable[tuple[int, memoryview]]
) -> None:
    """Fill each memory with the payload's bytes from its offset on.

    The next ranges are asked for before an answer is read, so that the server never waits.
    """
    with redis_errors():
        connection = client.connection_pool.get_connection()
        asked: deque[memoryview] = deque()
        ahead = 0

        def receive() -> None:
            nonlocal ahead
            if not receive_value(connection, asked[0]):
                raise not_found(record.payload_id)
            ahead -= asked.popleft().nbytes

        try:
            for wanted, memory in _pieces(record, targets):
                while asked and (
                    ahead + wanted.nbytes > _AHEAD_BYTES or len(asked) == _AHEAD_COMMANDS
                ):
                    receive()
                connection.send_command("GETRANGE", wanted.key, wanted.first, wanted.last)  # type: ignore[no-untyped-call]
                asked.append(memory)
                ahead += memory.nbytes
            while asked:
                receive()
        finally:
            if asked:  # answers are still on their way: the connection is of no use to anyone else
                connection.disconnect()  # type: ignore[no-untyped-call]
            client.connection_pool.release(connection)


def _pieces(
    record: Record, targets: Iterable[tuple[int, memoryview]]
) -> Iterator[tuple[Range, memoryview]]:
    """The ranges that fill the targets, each with its piece of their memory."""
    for start, memory in targets:
        position = 0
        for wanted in record.ranges(start, start + memory.nbytes):
            yield wanted, memory[position : position + wanted.nbytes]
            position += wanted.nbytes


def _read_header(client: redis.Redis, record: Record, sums: Sums | None) -> Header:
    """One round trip for an ordinary header, a second for a longer one; block by block where they
    are checked."""
    with as_malformed(record.payload_id):
        if sums is not None:
            head = verified_head(
                sums, lambda start, end: memoryview(fetch_bytes(client, record, start, end))
            )
            return parse_header(head, record.nbytes)
        start = fetch_bytes(client, record, 0, min(_HEADER_GUESS, record.nbytes))
        length = header_length(start)
        if len(start) < length <= record.nbytes:
            start += fetch_bytes(client, record, len(start), length)
        return parse_header(start, record.nbytes)
