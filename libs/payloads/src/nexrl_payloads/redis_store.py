"""Payloads as chunks in Redis, where gateway and ranks share no file system."""

from __future__ import annotations

import secrets
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

import redis
from nexrl_contract.errors import ServiceError
from tensor_codec import FrameClosed, Header, RawTensor, header_length, parse_header, row_spans

from .checks import BlockChecksums, BlockHasher, pieces
from .protocol import Chunk, PartUpload, Payload, PayloadStore, Rows, StoredPayload, Upload
from .redis_records import (
    CHUNK_BYTES,
    PREFIX,
    Record,
    Segment,
    chunk_key,
    load_parts,
    load_record,
    load_tables,
    payload_keys,
    record_key,
    renew_all,
    store_part,
    store_record,
    sums_key,
    sweep_redis,
    unlink,
)
from .redis_wire import KEY_TTL_S, ChunkSender, KeptMemory, Loan, connect, fetch, redis_errors
from .rules import (
    as_malformed,
    byte_views,
    check_count,
    check_id,
    check_part,
    check_same,
    not_found,
)

if TYPE_CHECKING:
    import torch

_HEADER_GUESS = 4096
_SLACK_BYTES = 64 * 1024
"""Of memory for a tensor, beyond its bytes: alignment, and the blocks at its ends."""
Span = tuple[int, int]


class _Chunks:
    """Joins what is written to chunks under a token of their own, and sends each by one SET; holds
    one chunk at the most."""

    def __init__(self, client: redis.Redis, payload_id: str, hasher: BlockHasher) -> None:
        self._client = client
        self._payload_id = payload_id
        self._hasher = hasher
        self._sender = ChunkSender(client)
        self._token = secrets.token_hex(8)
        self._joined = memoryview(bytearray(CHUNK_BYTES))
        self._filled = 0
        self._sent = 0
        self._settled = False

    def write(self, *chunks: Chunk) -> None:
        """Append chunks; those that are large enough are sent as they are."""
        views = byte_views(chunks)
        self._hasher.add(views)
        for view in views:
            while view.nbytes:
                view = self._take(view)

    def finish(self) -> Segment:
        """All chunks and their checksums are in Redis, and named by nobody yet."""
        if self._filled:
            self._send(self._joined[: self._filled])
        self._sender.settle()
        with redis_errors():
            self._client.set(
                sums_key(self._payload_id, self._token), self._hasher.table(), ex=KEY_TTL_S
            )
        # From here on a lost answer may hide a success: only the sweep removes these chunks.
        self._settled = True
        return Segment(self._token, self._hasher.nbytes, self._hasher.checksum)

    def abort(self) -> None:
        """Remove what was sent, as far as Redis answers; what stays has a TTL and is swept."""
        if not self._settled:
            self._settled = True
            # A chunk on its way would otherwise be stored after its removal.
            with suppress(ServiceError):
                self._sender.settle()
            self.remove()

    def remove(self) -> None:
        """Remove chunks that nobody names."""
        keys = [chunk_key(self._payload_id, self._token, chunk) for chunk in range(self._sent + 1)]
        with suppress(redis.RedisError):
            self._client.unlink(*keys, sums_key(self._payload_id, self._token))

    def _take(self, view: memoryview) -> memoryview:
        """Take one chunk's worth and return the rest."""
        if self._filled == 0 and view.nbytes >= CHUNK_BYTES:
            self._send(view[:CHUNK_BYTES])
            return view[CHUNK_BYTES:]
        count = min(CHUNK_BYTES - self._filled, view.nbytes)
        self._joined[self._filled : self._filled + count] = view[:count]
        self._filled += count
        if self._filled == CHUNK_BYTES:
            self._send(self._joined)
            self._filled = 0
        return view[count:]

    def _send(self, chunk: memoryview) -> None:
        self._sender.send(chunk_key(self._payload_id, self._token, self._sent), chunk)
        self._sent += 1


class RedisUpload(Upload):
    """See :class:`nexrl_payloads.Upload`."""

    def __init__(self, client: redis.Redis, payload_id: str, nbytes: int | None) -> None:
        self._client = client
        self._id = payload_id
        self._hasher = BlockHasher(f"payload {payload_id}", nbytes)
        self._chunks = _Chunks(client, payload_id, self._hasher)

    def write(self, *chunks: Chunk) -> None:
        self._chunks.write(*chunks)

    def commit(self) -> StoredPayload:
        self._hasher.finish()
        record = Record(self._id, [self._chunks.finish()])
        return store_record(self._client, record, self._hasher.table())

    def abort(self) -> None:
        self._chunks.abort()


class RedisPart(PartUpload):
    """See :class:`nexrl_payloads.PartUpload`; one that is there, or comes too late, is only
    hashed."""

    def __init__(self, client: redis.Redis, payload_id: str, n: int, nbytes: int | None) -> None:
        self._client = client
        self._id = payload_id
        self._n = n
        self._hasher = BlockHasher(f"part {n} of payload {payload_id}", nbytes, whole=True)
        self._known = load_parts(client, payload_id).get(n)
        with redis_errors():
            keep = self._known is None and not client.exists(record_key(payload_id))
        self._chunks = _Chunks(client, payload_id, self._hasher) if keep else None

    def write(self, *chunks: Chunk) -> None:
        if self._chunks is None:
            self._hasher.add(byte_views(chunks))
        else:
            self._chunks.write(*chunks)

    def commit(self, checksum: str | None) -> int:
        self._hasher.finish(checksum)
        known = self._known
        if self._chunks is not None:
            mine = self._chunks.finish()
            known = store_part(self._client, self._id, self._n, mine)
            if known != mine:  # another attempt has ended since this one began
                self._chunks.remove()
        sent = (self._hasher.nbytes, self._hasher.checksum)
        check_same(self._id, self._n, known and known[1:], sent)
        return self._hasher.nbytes

    def abort(self) -> None:
        if self._chunks is not None:
            self._chunks.abort()


class RedisPayload(Payload):
    """See :class:`nexrl_payloads.Payload`: what is asked for is fetched, with checksums in
    whole blocks, into memory that the store keeps."""

    mapped = False

    def __init__(
        self,
        client: redis.Redis,
        record: Record,
        memory: KeptMemory,
        checksums: BlockChecksums | None,
    ) -> None:
        self._client = client
        self._record = record
        self._checksums = checksums
        self.nbytes = record.nbytes
        with as_malformed(record.payload_id):
            self.header = self._read_header()
        room = self.nbytes + len(self.header.tensors) * _SLACK_BYTES
        self._loan: Loan | None = memory.lend(room)

    def torch(self, name: str, rows: Rows = None) -> torch.Tensor:
        return self._read(name, rows).torch()

    def check(self, name: str, rows: Rows = None) -> None:
        if self._checksums is not None:
            self._read(name, rows)

    def close(self) -> None:
        self._loan = None

    def _read(self, name: str, rows: Rows) -> RawTensor:
        if self._loan is None:
            raise FrameClosed(
                f"the payload was closed before tensor {name!a} was read; read it before"
            )
        info, spans, shape = row_spans(self.header, name, rows)
        data = self._neighbours(spans[0]) if len(spans) == 1 else self._gather(spans)
        return RawTensor(info.dtype, shape, data)

    def _neighbours(self, span: Span) -> memoryview:
        """Rows that are neighbours: a view of the blocks that hold them, placed so that it is
        aligned."""
        first, stop = span
        start, end = self._blocks(span)
        memory = self._take(end - start, first - start)
        self._fill([(start, memory)])
        return memory[first - start : stop - start]

    def _gather(self, spans: list[Span]) -> memoryview:
        """Rows that are no neighbours, joined; a block that several of them share is read once."""
        regions: list[Span] = []
        for start, end in sorted(self._blocks(span) for span in spans):
            if regions and start <= regions[-1][1]:
                start, end = regions[-1][0], max(end, regions.pop()[1])
            regions.append((start, end))
        starts = [start for start, _ in regions]
        memories = [memoryview(bytearray(end - start)) for start, end in regions]
        self._fill(list(zip(starts, memories, strict=True)))
        joined, place = self._take(sum(stop - first for first, stop in spans)), 0
        for first, stop in spans:
            region = bisect_right(starts, first) - 1
            at, count = first - starts[region], stop - first
            joined[place : place + count] = memories[region][at : at + count]
            place += count
        return joined

    def _take(self, nbytes: int, at: int = 0) -> memoryview:
        assert self._loan is not None
        return self._loan.take(nbytes, at)

    def _fill(self, wanted: list[tuple[int, memoryview]]) -> None:
        """Fill each memory with the payload's bytes from its start on, and check them."""
        _fetch(self._client, self._record, wanted)
        if self._checksums is not None:
            for start, memory in wanted:
                self._checksums.check_span(start, memory, self.header)

    def _blocks(self, span: Span) -> Span:
        """The span, widened to whole blocks where these are checked."""
        if self._checksums is None or span[0] == span[1]:
            return span
        blocks = self._checksums.covering(*span)
        return self._checksums.borders[blocks.start], self._checksums.borders[blocks.stop]

    def _read_header(self) -> Header:
        """One round trip for an ordinary header, a second for a longer one; block by block where
        they are checked."""

        def read(start: int, end: int) -> bytes:
            return _fetch_bytes(self._client, self._record, start, end)

        if self._checksums is not None:
            return parse_header(self._checksums.head(read), self.nbytes)
        start = read(0, min(_HEADER_GUESS, self.nbytes))
        length = header_length(start)
        if len(start) < length <= self.nbytes:
            start += read(len(start), length)
        return parse_header(start, self.nbytes)


class RedisStore(PayloadStore):
    """See :class:`nexrl_payloads.PayloadStore`. All state is in Redis, under keys with a TTL and of
    2 MiB at most."""

    def __init__(self, url: str) -> None:
        self._client = connect(url)
        self._memory = KeptMemory()

    def create(self, payload_id: str, nbytes: int | None = None) -> RedisUpload:
        return RedisUpload(self._client, check_id(payload_id), nbytes)

    def put_part(self, payload_id: str, n: int, nbytes: int | None = None) -> RedisPart:
        return RedisPart(self._client, check_id(payload_id), check_part(n), nbytes)

    def parts(self, payload_id: str) -> list[int]:
        return list(load_parts(self._client, check_id(payload_id)))

    def assemble(self, payload_id: str, count: int) -> StoredPayload:
        parts = load_parts(self._client, check_id(payload_id))
        check_count(payload_id, list(parts), count)
        record = Record(payload_id, list(parts.values()))
        ref = store_record(self._client, record, load_tables(self._client, record))
        renew_all(self._client, payload_id)
        return ref

    def open(self, payload_id: str, checksum: str | None = None) -> RedisPayload:
        record = self._record(payload_id)
        return RedisPayload(self._client, record, self._memory, self._checksums(record, checksum))

    def stream(self, payload_id: str, checksum: str | None = None) -> Iterator[bytes]:
        record = self._record(payload_id)
        checksums = self._checksums(record, checksum)
        return pieces(
            record.nbytes,
            lambda start, end: _fetch_bytes(self._client, record, start, end),
            checksums,
        )

    def nbytes(self, payload_id: str) -> int:
        record = load_record(self._client, check_id(payload_id))
        if record is not None:
            return record.nbytes
        parts = load_parts(self._client, payload_id)
        if not parts:
            raise not_found(payload_id)
        return sum(part.nbytes for part in parts.values())

    def delete(self, payload_id: str) -> None:
        unlink(self._client, payload_keys(self._client, check_id(payload_id)))

    def sweep(self, in_use: set[str], *, result_age_s: float, upload_age_s: float) -> list[str]:
        return sweep_redis(
            self._client, in_use, result_age_s=result_age_s, upload_age_s=upload_age_s
        )

    def check(self) -> None:
        with redis_errors():
            self._client.set(f"{PREFIX}:check", b"x", px=1000)

    def _checksums(self, record: Record, checksum: str | None) -> BlockChecksums | None:
        if checksum is None:
            return None
        tables = load_tables(self._client, record)
        return BlockChecksums(record.payload_id, tables, checksum, record.nbytes)

    def _record(self, payload_id: str) -> Record:
        record = load_record(self._client, check_id(payload_id))
        if record is None:
            raise not_found(payload_id)
        return record


def _fetch(client: redis.Redis, record: Record, wanted: list[tuple[int, memoryview]]) -> None:
    """Fill each memory with the payload's bytes from its start on. Raises PAYLOAD_NOT_FOUND if
    they have gone."""
    if not fetch(
        client, (each for start, memory in wanted for each in record.wanted(start, memory))
    ):
        raise not_found(record.payload_id)


def _fetch_bytes(client: redis.Redis, record: Record, start: int, end: int) -> bytes:
    memory = bytearray(end - start)
    _fetch(client, record, [(start, memoryview(memory))])
    return bytes(memory)
