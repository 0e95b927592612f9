"""What Redis holds of a payload: segments of chunks, listed by a record."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NamedTuple

import redis
from nexrl_contract.errors import ServiceError

from .common import damaged, not_found, sums_checksum
from .protocol import StoredPayload
from .redis_client import (
    CHUNK_BYTES,
    KEY_TTL_S,
    chunk_key,
    meta_key,
    parts_key,
    redis_errors,
    sums_key,
)


class Segment(NamedTuple):
    """The chunks of one upload: a payload written at once has one segment, one sent in parts a
    segment a part."""

    token: str
    nbytes: int
    checksum: str

    def keys(self, payload_id: str) -> list[str]:
        """The keys of its chunks, in order, and of their checksums."""
        chunks = [
            chunk_key(payload_id, self.token, chunk)
            for chunk in range(-(-self.nbytes // CHUNK_BYTES))
        ]
        return [*chunks, sums_key(payload_id, self.token)]


class Range(NamedTuple):
    """Bytes ``first`` to ``last`` (inclusive, as GETRANGE counts) of one chunk."""

    key: str
    first: int
    last: int

    @property
    def nbytes(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True, slots=True)
class Record:
    """A payload that is there."""

    payload_id: str
    segments: list[Segment]

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return sum(segment.nbytes for segment in self.segments)

    def keys(self) -> list[str]:
        """The keys of all chunks and their checksums."""
        return [key for segment in self.segments for key in segment.keys(self.payload_id)]

    def ranges(self, start: int, end: int) -> list[Range]:
        """Where bytes ``start`` to ``end`` (exclusive) of the payload are."""
        found = []
        base = 0
        for segment in self.segments:
            position, stop = max(start - base, 0), min(end - base, segment.nbytes)
            while position < stop:
                chunk, first = divmod(position, CHUNK_BYTES)
                count = min(CHUNK_BYTES - first, stop - position)
                found.append(
                    Range(
                        chunk_key(self.payload_id, segment.token, chunk), first, first + count - 1
                    )
                )
                position += count
            base += segment.nbytes
        return found


def load_record(client: redis.Redis, payload_id: str) -> Record | None:
    """The payload's record, None where there is none."""
    with redis_errors():
        stored = client.get(meta_key(payload_id))
    if stored is None:
        return None
    try:
        return Record(payload_id, [Segment(*segment) for segment in json.loads(stored)["segments"]])
    except (ValueError, LookupError, TypeError):
        raise damaged(payload_id, "the record") from None


def load_tables(client: redis.Redis, payload_id: str, segments: list[Segment]) -> bytes:
    """The tables of checksums of all segments, joined. Raises PAYLOAD_NOT_FOUND where one has
    gone."""
    keys = [sums_key(payload_id, segment.token) for segment in segments]
    with redis_errors():
        tables = client.mget(keys)
    found = [bytes(table) for table in tables if isinstance(table, bytes)]
    if len(found) < len(keys):
        raise not_found(payload_id)
    return b"".join(found)


def load_parts(client: redis.Redis, payload_id: str) -> dict[int, Segment]:
    """The parts that are there, by number."""
    with redis_errors():
        stored = client.hgetall(parts_key(payload_id))
    return {
        int(n): Segment(*json.loads(segment))
        for n, segment in sorted(stored.items(), key=lambda item: int(item[0]))
    }


def store_record(client: redis.Redis, record: Record, tables: bytes) -> StoredPayload:
    """Make the payload visible, after making sure that none of its chunks has expired or been
    swept."""
    renew(client, record.payload_id, record.keys())
    with redis_errors():
        client.set(
            meta_key(record.payload_id), json.dumps({"segments": record.segments}), ex=KEY_TTL_S
        )
    return StoredPayload(record.payload_id, record.nbytes, sums_checksum(tables))


def store_part(client: redis.Redis, payload_id: str, n: int, segment: Segment) -> Segment:
    """Make ``segment`` part ``n`` unless there is one already; returns the one that is there
    now."""
    renew(client, payload_id, segment.keys(payload_id))
    key = parts_key(payload_id)
    with redis_errors(), client.pipeline(transaction=True) as pipeline:
        pipeline.hsetnx(key, str(n), json.dumps(segment))
        pipeline.expire(key, KEY_TTL_S)
        pipeline.hget(key, str(n))
        return Segment(*json.loads(pipeline.execute()[2]))


def renew(client: redis.Redis, payload_id: str, keys: list[str]) -> None:
    """Begin the keys' life again. Raises PAYLOAD_NOT_FOUND if one of them is gone."""
    with redis_errors(), client.pipeline(transaction=False) as pipeline:
        for key in keys:
            pipeline.expire(key, KEY_TTL_S)
        renewed = pipeline.execute()
    if not all(renewed):
        raise ServiceError(
            "PAYLOAD_NOT_FOUND", f"payload {payload_id} has expired in part: send it again"
        )
