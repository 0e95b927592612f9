"""Payloads as chunks in Redis, where gateway and ranks share no file system."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING

from .common import (
    PIECE,
    Sums,
    check_count,
    check_id,
    check_part,
    damaged,
    not_found,
    verified_pieces,
)
from .protocol import Chunk, PartUpload, StoredPayload
from .redis_client import PREFIX, connect, meta_key, redis_errors
from .redis_payload import RedisPayload, fetch_bytes
from .redis_records import Record, load_parts, load_record, load_tables, store_record
from .redis_sweep import payload_keys, renew_all, sweep_redis, unlink
from .redis_uploads import RedisPart, RedisUpload
from .repeated import RepeatedPart

if TYPE_CHECKING:
    from .arena import Arena


class RedisStore:
    """See :class:`nexrl_payloads.PayloadStore`. All state is in Redis, under keys with a TTL and of
    2 MiB at most."""

    def __init__(self, url: str) -> None:
        self._client = connect(url)

    @cached_property
    def _arena(self) -> Arena:
        from .arena import Arena  # a gateway, which reads no tensors, need not load NumPy

        return Arena()

    def create(self, payload_id: str, nbytes: int | None = None) -> RedisUpload:
        return RedisUpload(self._client, check_id(payload_id), nbytes)

    def put(self, payload_id: str, buffers: Iterable[Chunk]) -> StoredPayload:
        with self.create(payload_id) as upload:
            for buffer in (
                buffers
            ):  # not *buffers: a frame's len() is bytes, and would size the list of arguments
                upload.write(buffer)
            return upload.commit()

    def put_part(self, payload_id: str, n: int, nbytes: int | None = None) -> PartUpload:
        known = load_parts(self._client, check_id(payload_id)).get(check_part(n))
        if known is not None:
            return RepeatedPart(payload_id, n, nbytes, (known.nbytes, known.checksum))
        with redis_errors():
            if self._client.exists(meta_key(payload_id)):
                return RepeatedPart(payload_id, n, nbytes, None)
        return RedisPart(self._client, payload_id, n, nbytes)

    def parts(self, payload_id: str) -> list[int]:
        return list(load_parts(self._client, check_id(payload_id)))

    def assemble(self, payload_id: str, count: int) -> StoredPayload:
        parts = load_parts(self._client, check_id(payload_id))
        check_count(payload_id, list(parts), count)
        record = Record(payload_id, list(parts.values()))
        ref = store_record(
            self._client, record, load_tables(self._client, payload_id, record.segments)
        )
        renew_all(self._client, payload_id)
        return ref

    def open(self, payload_id: str, checksum: str | None = None) -> RedisPayload:
        record = self._record(payload_id)
        return RedisPayload(self._client, record, self._arena, self._sums(record, checksum))

    def stream(self, payload_id: str, checksum: str | None = None) -> Iterator[bytes]:
        record = self._record(payload_id)
        sums = self._sums(record, checksum)

        def pieces() -> Iterator[bytes]:
            if sums is not None:
                yield from verified_pieces(
                    sums, lambda start, end: fetch_bytes(self._client, record, start, end)
                )
                return
            for start in range(0, record.nbytes, PIECE):
                end = min(start + PIECE, record.nbytes)
                yield fetch_bytes(self._client, record, start, end)

        return pieces()

    def nbytes(self, payload_id: str) -> int:
        record = load_record(self._client, check_id(payload_id))
        segments = (
            record.segments
            if record is not None
            else list(load_parts(self._client, payload_id).values())
        )
        if not segments:
            raise not_found(payload_id)
        return sum(segment.nbytes for segment in segments)

    def local_path(self, payload_id: str) -> None:
        self._record(payload_id)

    def delete(self, payload_id: str) -> None:
        unlink(self._client, payload_keys(self._client, check_id(payload_id)))

    def touch(self, payload_id: str) -> None:
        if not renew_all(self._client, check_id(payload_id)):
            raise not_found(payload_id)

    def sweep(self, in_use: set[str], *, result_age_s: float, upload_age_s: float) -> list[str]:
        return sweep_redis(
            self._client, in_use, result_age_s=result_age_s, upload_age_s=upload_age_s
        )

    def check(self) -> None:
        with redis_errors():
            self._client.set(f"{PREFIX}:check", b"x", px=1000)

    def _sums(self, record: Record, checksum: str | None) -> Sums | None:
        if checksum is None:
            return None
        tables = load_tables(self._client, record.payload_id, record.segments)
        sums = Sums(record.payload_id, tables, checksum)
        if sums.nbytes != record.nbytes:
            raise damaged(
                record.payload_id, f"the length ({record.nbytes} bytes now, {sums.nbytes} stored)"
            )
        return sums

    def _record(self, payload_id: str) -> Record:
        record = load_record(self._client, check_id(payload_id))
        if record is None:
            raise not_found(payload_id)
        return record
