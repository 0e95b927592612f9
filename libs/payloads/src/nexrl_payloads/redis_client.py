"""The payload store's own Redis client, its keys, and the names of its failures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import redis
from nexrl_contract.errors import ServiceError
from redis.backoff import NoBackoff
from redis.exceptions import OutOfMemoryError, RedisError
from redis.retry import Retry

PREFIX = "nexrl:payload:"
CHUNK_BYTES = 2 * 1024 * 1024  # the fastest size; values of 8 MiB and more cost twice as much
KEY_TTL_S = 48 * 3600
"""Every key's life since its last write or touch; only where nobody sweeps is it reached."""


def connect(url: str) -> redis.Redis:
    """A client for large values: bytes as they are, no retries behind the caller's back, no endless
    waits."""
    return redis.Redis.from_url(
        url,
        decode_responses=False,
        socket_timeout=20.0,
        socket_connect_timeout=2.0,
        socket_read_size=256 * 1024,
        retry=Retry(NoBackoff(), 0),
        health_check_interval=30,
    )


@contextmanager
def redis_errors() -> Iterator[None]:
    """Turn Redis' refusals into NO_SPACE or STORE_UNAVAILABLE."""
    try:
        yield
    except OutOfMemoryError as error:
        raise ServiceError(
            "NO_SPACE",
            (
                "the payload store's Redis has no memory left: raise its maxmemory, or send the "
                "batch "
                "later"
            ),
        ) from error
    except RedisError as error:
        raise ServiceError(
            "STORE_UNAVAILABLE",
            f"the payload store's Redis did not answer ({type(error).__name__}): try again",
        ) from error


def meta_key(payload_id: str) -> str:
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
