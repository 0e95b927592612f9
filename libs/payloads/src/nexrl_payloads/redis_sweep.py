"""What in Redis nobody needs any more, judged by the life that its keys have left."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import redis

from .common import age_limit
from .redis_client import KEY_TTL_S, PREFIX, meta_key, parts_key, redis_errors
from .redis_records import load_parts, load_record

_SCAN_COUNT = 1000


def sweep_redis(
    client: redis.Redis, in_use: set[str], *, result_age_s: float, upload_age_s: float
) -> list[str]:
    """See :meth:`nexrl_payloads.PayloadStore.sweep`; the leases of ids in use are renewed."""
    removed = []
    for payload_id, keys in _keys_by_id(client).items():
        if payload_id in in_use:
            renew_all(client, payload_id)
            continue
        youngest, ages = _ages(client, keys)
        if youngest >= age_limit(payload_id, result_age_s, upload_age_s):
            old = keys
        else:
            old = _abandoned(client, payload_id, ages, upload_age_s)
        if old:
            unlink(client, old)
            removed.append(payload_id)
    return sorted(removed)


def payload_keys(client: redis.Redis, payload_id: str) -> list[str]:
    """The keys of a payload and its parts, its record first; whether they exist is not looked
    at."""
    record, parts = load_record(client, payload_id), load_parts(client, payload_id)
    chunks = {key for segment in parts.values() for key in segment.keys(payload_id)}
    if record is not None:
        chunks.update(record.keys())
    return [meta_key(payload_id), parts_key(payload_id), *chunks]


def renew_all(client: redis.Redis, payload_id: str) -> bool:
    """Begin the life of all of a payload's keys again; False if there is neither a payload nor a
    part."""
    with redis_errors(), client.pipeline(transaction=False) as pipeline:
        for key in payload_keys(client, payload_id):
            pipeline.expire(key, KEY_TTL_S)
        return any(pipeline.execute())


def unlink(client: redis.Redis, keys: Sequence[str]) -> None:
    """Remove keys, in order."""
    with redis_errors():
        for start in range(0, len(keys), _SCAN_COUNT):
            client.unlink(*keys[start : start + _SCAN_COUNT])


def _keys_by_id(client: redis.Redis) -> dict[str, list[str]]:
    """All keys of the store by payload; the record comes first, so that a half-removed payload is
    not there."""
    found: dict[str, list[str]] = defaultdict(list)
    with redis_errors():
        for raw in client.scan_iter(match=f"{PREFIX}*", count=_SCAN_COUNT):
            key = raw.decode()
            found[key.removeprefix(PREFIX).partition(":")[0]].append(key)
    return {payload_id: sorted(keys, key=len) for payload_id, keys in found.items() if payload_id}


def _ages(client: redis.Redis, keys: list[str]) -> tuple[float, dict[str, float]]:
    """Seconds since the youngest key was written or touched, and of each segment the same, by its
    token."""
    with redis_errors(), client.pipeline(transaction=False) as pipeline:
        for key in keys:
            pipeline.pttl(key)
        ages = [
            KEY_TTL_S - left / 1000 if left >= 0 else float("inf") for left in pipeline.execute()
        ]
    by_token: dict[str, float] = {}
    for key, age in zip(keys, ages, strict=True):
        if key.count(":") == PREFIX.count(":") + 2:
            token = key.split(":")[-2]
            by_token[token] = min(age, by_token.get(token, age))
    return min(ages), by_token


def _abandoned(
    client: redis.Redis, payload_id: str, ages: dict[str, float], upload_age_s: float
) -> list[str]:
    """The chunks of a live payload's segments that no record names and nobody has written to for
    long."""
    old = {token for token, age in ages.items() if age >= upload_age_s}
    if not old:
        return []
    record, parts = load_record(client, payload_id), load_parts(client, payload_id)
    named = {segment.token for segment in parts.values()}
    if record is not None:
        named.update(segment.token for segment in record.segments)
    patterns = [f"{PREFIX}{payload_id}:{token}:*" for token in old - named]
    with redis_errors():
        return [
            key.decode()
            for pattern in patterns
            for key in client.scan_iter(match=pattern, count=_SCAN_COUNT)
        ]
