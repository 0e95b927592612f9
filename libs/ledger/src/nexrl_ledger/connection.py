"""Redis clients without hidden retries, and what to do while Redis is away.

A lost reply must surface, because a repeated command may act twice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import redis
from nexrl_contract.names import ENDED_CHANNEL
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, OutOfMemoryError, ReadOnlyError
from redis.retry import Retry

Answer = TypeVar("Answer")
_LISTEN_S = 0.5
_AWAY = (
    redis.exceptions.ConnectionError,
    redis.exceptions.TimeoutError,
    BusyLoadingError,
    OutOfMemoryError,
    ReadOnlyError,
)
# A full disk, a missing replica, a cluster that fails over: redis-py has no classes for these.
_PASSING = ("MISCONF", "NOREPLICAS", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "BUSY ")


def connect(url: str, *, decode: bool = True, timeout_s: float | None = 2.0) -> redis.Redis:
    """A client of ``url`` with redis-py's own retries off; ``timeout_s`` bounds every command, None
    for blocking reads."""
    return redis.Redis.from_url(
        url,
        decode_responses=decode,
        socket_timeout=timeout_s,
        socket_connect_timeout=2.0,
        retry=Retry(NoBackoff(), 0),
        health_check_interval=30,
    )


def is_away(error: Exception) -> bool:
    """Whether Redis did not answer, or takes nothing just now (its disk may be full): what was
    asked for may be repeated."""
    if isinstance(error, _AWAY):
        return True
    return isinstance(error, redis.exceptions.ResponseError) and any(
        code in str(error) for code in _PASSING
    )


def redis_fault(client: redis.Redis) -> str | None:
    """Why this Redis may lose what it has acknowledged, and what to set; None where it keeps it, or
    does not say.

    From INFO, which managed servers answer, too. Raises RedisError where it does not answer.
    """
    try:
        with client.pipeline(transaction=False) as pipe:
            pipe.info("memory")
            pipe.info("persistence")
            told: Any = {
                name: value for section in pipe.execute() for name, value in section.items()
            }
    except redis.exceptions.ResponseError:
        return None
    policy = told.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        return (
            f"Redis drops records when its memory is full (maxmemory-policy {policy}): "
            "CONFIG SET maxmemory-policy noeviction, and the same in its configuration"
        )
    if not told.get("aof_enabled", 1):
        return (
            "Redis keeps no append-only file: CONFIG SET appendonly yes, and the same in its "
            "configuration"
        )
    if told.get("aof_last_write_status", "ok") != "ok":
        return "Redis cannot write its append-only file: free space on its disk"
    return None


def until_redis(
    act: Callable[[], Answer], *, while_waiting: Callable[[], None] = lambda: None
) -> Answer:
    """Repeat an *idempotent* ``act`` while Redis :func:`is_away`; ``while_waiting`` runs between
    attempts, half a second apart."""
    while True:
        try:
            return act()
        except redis.exceptions.RedisError as error:
            if not is_away(error):
                raise
            while_waiting()
            time.sleep(0.5)


def follow_ended(
    redis_url: str,
    stopping: threading.Event,
    *,
    on_ended: Callable[[str], None],
    on_gap: Callable[[], None],
) -> None:
    """Call ``on_ended(job_id)`` for each job that ends, until ``stopping`` is set.

    ``on_gap()`` is called where jobs may have ended while nobody listened: at the beginning, and
    each time that Redis was away.
    """
    client = connect(redis_url)
    while not stopping.is_set():
        try:
            with client.pubsub(ignore_subscribe_messages=True) as channel:  # type: ignore[no-untyped-call]
                channel.subscribe(ENDED_CHANNEL)
                on_gap()
                while not stopping.is_set():
                    message = channel.get_message(timeout=_LISTEN_S)
                    if message is not None:
                        on_ended(message["data"])
        except redis.exceptions.RedisError:
            stopping.wait(_LISTEN_S)
    client.close()
