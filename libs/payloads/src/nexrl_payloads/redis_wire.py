"""Large values to and from Redis over redis-py's pool of connections, several on their way at once.

redis-py's commands send a value only after copying it into one packed command, and wait for each
answer: an upload takes twice as long (decision 0008). So this module speaks to the pool's
connections: it packs SET itself around the caller's memory, and asks for the next values before it
reads the last ones. What it relies on stands in ``tests/payloads/test_redis_py_contract.py``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import redis
from nexrl_contract.errors import ServiceError
from redis.backoff import NoBackoff
from redis.connection import Connection
from redis.exceptions import OutOfMemoryError, RedisError
from redis.retry import Retry

KEY_TTL_S = 48 * 3600
"""Every key's life since its last write or renewal; only where nobody sweeps is it reached."""

_AHEAD_BYTES = 4 * 1024 * 1024
_AHEAD_COMMANDS = 64


class Wanted(NamedTuple):
    """Bytes of the value at ``key``, from ``first`` on, that fill ``memory``."""

    key: str
    first: int
    memory: memoryview


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
            "the payload store's Redis has no memory left: raise its maxmemory, or send the batch "
            "later",
        ) from error
    except RedisError as error:
        raise ServiceError(
            "STORE_UNAVAILABLE",
            f"the payload store's Redis did not answer ({type(error).__name__}): try again",
        ) from error


class ChunkSender:
    """SETs with TTL, one after another: Redis stores a chunk while the caller fetches the next
    one."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._waiting: Connection | None = None

    def send(self, key: str, chunk: memoryview) -> None:
        """Send a chunk, whose memory is free again at the return; raises what became of the one
        before."""
        self.settle()
        name, life = key.encode(), str(KEY_TTL_S).encode()
        head = b"*5\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(name), name, chunk.nbytes)
        tail = b"\r\n$2\r\nEX\r\n$%d\r\n%b\r\n" % (len(life), life)
        with redis_errors():
            connection = self._client.connection_pool.get_connection()
            try:
                connection.send_packed_command([head, chunk, tail])  # type: ignore[no-untyped-call]
            except BaseException:  # half a command may have been sent
                connection.disconnect()  # type: ignore[no-untyped-call]
                self._client.connection_pool.release(connection)
                raise
            self._waiting = connection

    def settle(self) -> None:
        """Wait for the last chunk's answer; raises NO_SPACE or STORE_UNAVAILABLE."""
        connection, self._waiting = self._waiting, None
        if connection is None:
            return
        with redis_errors():
            try:
                connection.read_response()
            except redis.ResponseError:  # an answer too
                raise
            except BaseException:
                connection.disconnect()  # type: ignore[no-untyped-call]
                raise
            finally:
                self._client.connection_pool.release(connection)


def fetch(client: redis.Redis, wanted: Iterable[Wanted]) -> bool:
    """Fill each memory; False if one of the values is missing or too short.

    The next ranges are asked for before an answer is read, so that the server never waits.
    """
    asked: deque[memoryview] = deque()
    ahead = 0
    with redis_errors():
        connection = client.connection_pool.get_connection()
        try:
            for key, first, memory in wanted:
                while asked and (
                    ahead + memory.nbytes > _AHEAD_BYTES or len(asked) == _AHEAD_COMMANDS
                ):
                    ahead -= asked[0].nbytes
                    if not _receive(connection, asked[0]):
                        return False
                    asked.popleft()
                last = first + memory.nbytes - 1
                connection.send_command("GETRANGE", key, first, last)  # type: ignore[no-untyped-call]
                asked.append(memory)
                ahead += memory.nbytes
            while asked:
                if not _receive(connection, asked[0]):
                    return False
                asked.popleft()
            return True
        finally:
            if asked:  # answers are still on their way: the connection is of no use to anyone else
                connection.disconnect()  # type: ignore[no-untyped-call]
            client.connection_pool.release(connection)


def _receive(connection: Connection, memory: memoryview) -> bool:
    value = connection.read_response()
    if not isinstance(value, bytes) or len(value) != memory.nbytes:
        return False
    memory[:] = value
    return True
