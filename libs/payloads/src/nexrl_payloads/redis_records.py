"""What Redis holds of a payload: segments of chunks, a record that lists them, and what of it
nobody needs any more."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import redis
from nexrl_contract.errors import ServiceError

from .checks import damaged, tables_checksum
from .protocol import StoredPayload
from .redis_wire import KEY_TTL_S, Wanted, redis_errors
from .rules import age_limit, not_found

PREFIX = "nexrl:payload:"
CHUNK_BYTES = 2 * 1024 * 1024  # the fastest size; values of 8 MiB and more cost twice as much
_SCAN_COUNT = 1000


def record_key(payload_id: str) -> str:
    """String: the payload's record as JSON; a payload is there when this is."""
    return f"{PREFIX}{payload_id}"


def parts_key(payload_id: str) -> str:
    """Hash, part number -> its segment as JSON."""
    return f"{PREFIX}{payload_id}:parts"


def sums_key(payload_id: str, token: str) -> str:
    """String: the checksums of the blocks of the segment ``token``."""
    return f"{PREFIX}{payload_id}:{token}:sums"


def chunk_key(payload_id: str, token: str, chunk: int) -> str:
    """String: chunk ``chunk`` of the segment ``token``, CHUNK_BYTES long except for the last."""
    return f"{PREFIX}{payload_id}:{token}:{chunk}"


class Segment(NamedTuple):
    """The chunks of one upload: a payload written at once has one segment, one sent in parts a
    segment a part."""

    token: str
    nbytes: int
    checksum: str

    def keys(self, payload_id: str) -> list[str]:
        """The keys of its chunks, in order, and of their checksums."""
        chunks = range(-(-self.nbytes // CHUNK_BYTES))
        keys = [chunk_key(payload_id, self.token, chunk) for chunk in chunks]
        return [*keys, sums_key(payload_id, self.token)]


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

    def wanted(self, start: int, memory: memoryview) -> Iterator[Wanted]:
        """The pieces of chunks that fill ``memory`` with the payload's bytes from ``start`` on."""
        base, end = 0, start + memory.nbytes
        for segment in self.segments:
            position, stop = max(start - base, 0), min(end - base, segment.nbytes)
            while position < stop:
                chunk, first = divmod(position, CHUNK_BYTES)
                count = min(CHUNK_BYTES - first, stop - position)
                at = base + position - start
                key = chunk_key(self.payload_id, segment.token, chunk)
                yield Wanted(key, first, memory[at : at + count])
                position += count
            base += segment.nbytes


def load_record(client: redis.Redis, payload_id: str) -> Record | None:
    """The payload's record, None where there is none."""
    with redis_errors():
        stored = client.get(record_key(payload_id))
    if stored is None:
        return None
    try:
        return Record(payload_id, [Segment(*segment) for segment in json.loads(stored)["segments"]])
    except (ValueError, LookupError, TypeError):
        raise damaged(payload_id, "the record") from None


def load_tables(client: redis.Redis, record: Record) -> bytes:
    """The tables of checksums of all segments, joined. Raises PAYLOAD_NOT_FOUND where one has
    gone."""
    keys = [sums_key(record.payload_id, segment.token) for segment in record.segments]
    with redis_errors():
        tables = client.mget(keys)
    found = [bytes(table) for table in tables if isinstance(table, bytes)]
    if len(found) < len(keys):
        raise not_found(record.payload_id)
    return b"".join(found)


def load_parts(client: redis.Redis, payload_id: str) -> dict[int, Segment]:
    """The parts that are there, by number."""
    with redis_errors():
        stored = client.hgetall(parts_key(payload_id))
    found = {int(n): Segment(*json.loads(segment)) for n, segment in stored.items()}
    return dict(sorted(found.items()))


def store_record(client: redis.Redis, record: Record, tables: bytes) -> StoredPayload:
    """Make the payload visible, after making sure that none of its chunks has expired or been
    swept."""
    _renew(client, record.payload_id, record.keys())
    with redis_errors():
        client.set(
            record_key(record.payload_id), json.dumps({"segments": record.segments}), ex=KEY_TTL_S
        )
    return StoredPayload(record.payload_id, record.nbytes, tables_checksum(tables))


def store_part(client: redis.Redis, payload_id: str, n: int, segment: Segment) -> Segment:
    """Make ``segment`` part ``n`` unless there is one already; returns the one that is there
    now."""
    _renew(client, payload_id, segment.keys(payload_id))
    key = parts_key(payload_id)
    # Of two attempts at one part that end at once, HSETNX lets one count; both learn which.
    with redis_errors(), client.pipeline(transaction=True) as pipeline:
        pipeline.hsetnx(key, str(n), json.dumps(segment))
        pipeline.expire(key, KEY_TTL_S)
        pipeline.hget(key, str(n))
        return Segment(*json.loads(pipeline.execute()[2]))


def payload_keys(client: redis.Redis, payload_id: str) -> list[str]:
    """The keys of a payload and its parts, its record first; whether they exist is not looked
    at."""
    record, parts = load_record(client, payload_id), load_parts(client, payload_id)
    chunks = {key for segment in parts.values() for key in segment.keys(payload_id)}
    if record is not None:
        chunks.update(record.keys())
    return [record_key(payload_id), parts_key(payload_id), *chunks]


def renew_all(client: redis.Redis, payload_id: str) -> None:
    """Begin the life of all of a payload's keys again."""
    _expire(client, payload_keys(client, payload_id))


def unlink(client: redis.Redis, keys: Sequence[str]) -> None:
    """Remove keys, in order."""
    with redis_errors():
        for start in range(0, len(keys), _SCAN_COUNT):
            client.unlink(*keys[start : start + _SCAN_COUNT])


def sweep_redis(
    client: redis.Redis, in_use: set[str], *, result_age_s: float, upload_age_s: float
) -> list[str]:
    """See :meth:`nexrl_payloads.PayloadStore.sweep`; the lives of ids in use are renewed."""
    removed = []
    for payload_id, keys in _keys_by_id(client).items():
        if payload_id in in_use:
            renew_all(client, payload_id)
            continue
        ages = _ages(client, keys)
        if min(ages.values()) >= age_limit(payload_id, result_age_s, upload_age_s):
            old = keys
        else:
            old = _abandoned(client, payload_id, ages, upload_age_s)
        if old:
            unlink(client, old)
            removed.append(payload_id)
    return sorted(removed)


def _renew(client: redis.Redis, payload_id: str, keys: Sequence[str]) -> None:
    """Begin the keys' life again. Raises PAYLOAD_NOT_FOUND if one of them is gone."""
    if not all(_expire(client, keys)):
        raise ServiceError(
            "PAYLOAD_NOT_FOUND", f"payload {payload_id} has expired in part: send it again"
        )


def _expire(client: redis.Redis, keys: Sequence[str]) -> list[bool]:
    with redis_errors(), client.pipeline(transaction=False) as pipeline:
        for key in keys:
            pipeline.expire(key, KEY_TTL_S)
        return [bool(found) for found in pipeline.execute()]


def _keys_by_id(client: redis.Redis) -> dict[str, list[str]]:
    """All keys of the store by payload; the record comes first, so that a half-removed payload is
    not there."""
    found: dict[str, list[str]] = defaultdict(list)
    with redis_errors():
        for raw in client.scan_iter(match=f"{PREFIX}*", count=_SCAN_COUNT):
            key = raw.decode()
            found[key.removeprefix(PREFIX).partition(":")[0]].append(key)
    return {payload_id: sorted(keys, key=len) for payload_id, keys in found.items() if payload_id}


def _ages(client: redis.Redis, keys: list[str]) -> dict[str, float]:
    """Seconds since each key was written or renewed, by the life that it has left."""
    with redis_errors(), client.pipeline(transaction=False) as pipeline:
        for key in keys:
            pipeline.pttl(key)
        left = pipeline.execute()
    return {
        key: KEY_TTL_S - ms / 1000 if ms >= 0 else float("inf")
        for key, ms in zip(keys, left, strict=True)
    }


def _abandoned(
    client: redis.Redis, payload_id: str, ages: dict[str, float], upload_age_s: float
) -> list[str]:
    """The chunks of a live payload's segments that no record names and nobody has written to for
    long."""
    by_token: dict[str, dict[str, float]] = defaultdict(dict)
    for key, age in ages.items():
        _, _, rest = key.removeprefix(PREFIX).partition(":")
        if ":" in rest:
            by_token[rest.partition(":")[0]][key] = age
    old = {token for token, keys in by_token.items() if min(keys.values()) >= upload_age_s}
    if not old:
        return []
    # The records are read after the ages: what was named meanwhile stays.
    record, parts = load_record(client, payload_id), load_parts(client, payload_id)
    named = {segment.token for segment in parts.values()}
    if record is not None:
        named.update(segment.token for segment in record.segments)
    return [key for token in old - named for key in by_token[token]]
