"""Large values over redis-py's connections, sent from and received into the caller's memory.

redis-py's commands copy a value two to three times, into fresh pages, and wait for each answer:
writing takes twice as long, reading a tenth longer (decision 0007). So this module packs SET itself
around the caller's memory, asks for the next values before it reads the last ones, and receives
them from the connection's socket, for which redis-py has no public name: ``_sock``. No connection
goes back to the pool before all its answers have been read, or it has been closed. What else it
relies on stands in ``tests/payloads/test_redis_py_contract.py``.
"""

from __future__ import annotations

import mmap
import socket
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import redis
from nexrl_contract.errors import ServiceError
from redis.backoff import NoBackoff
from redis.connection import Connection
from redis.exceptions import OutOfMemoryError, RedisError
from redis.retry import Retry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

KEY_TTL_S = 48 * 3600
"""Every key's life since its last write or renewal; only where nobody sweeps is it reached."""

_AHEAD_BYTES = 4 * 1024 * 1024
_AHEAD_COMMANDS = 64
_ALIGNMENT = 64
_HUGE_PAGE = 2 * 1024 * 1024


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


class Loan:
    """Memory of one payload's reader, handed out piece by piece. Every piece keeps it alive."""

    def __init__(self, root: NDArray[np.uint8]) -> None:
        self._root = root
        self._used = 0

    def take(self, nbytes: int, at: int = 0) -> memoryview:
        """``nbytes`` of writable memory, whose byte ``at`` is aligned to a cache line; beyond the
        loan's size, memory of its own."""
        start = self._used + -(self._used + at) % _ALIGNMENT
        if start + nbytes > self._root.nbytes:
            return memoryview(bytearray(nbytes))
        self._used = start + nbytes
        return self._root[start : self._used].data


class KeptMemory:
    """Lends one buffer to one payload after another, as fresh pages cost as much as what is read
    into them; while tensors still view it, the next loan is a new buffer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: mmap.mmap | None = None
        self._root: weakref.ref[NDArray[np.uint8]] | None = None

    def lend(self, nbytes: int) -> Loan:
        """``nbytes`` for one reader; pages that are never touched cost nothing."""
        import numpy as np  # a gateway, which reads no tensors, need not load it

        with self._lock:
            # Two readers at once never share: the first one's root is alive as long as its pieces.
            free = self._root is None or self._root() is None
            if self._kept is None or not free or len(self._kept) < nbytes:
                size = max(nbytes + -nbytes % _HUGE_PAGE, _HUGE_PAGE)
                self._kept = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                if hasattr(mmap, "MADV_HUGEPAGE"):
                    self._kept.madvise(mmap.MADV_HUGEPAGE)
            root = np.frombuffer(self._kept, np.uint8)
            self._root = weakref.ref(root)
            return Loan(root)


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
    """Receive the bulk string that answers a command; False if it has another length.

    After False or an exception answers may be left on the connection: it must be closed.
    """
    source: socket.socket = connection._sock  # type: ignore[assignment]
    expected = b"$%d\r\n" % memory.nbytes
    try:
        line = b""
        while len(line) < len(expected) and b"\n" not in line:
            more = source.recv(len(expected) - len(line))
            if not more:
                raise ConnectionError("it was closed")
            line += more
        if line.startswith(b"-"):
            raise redis.ResponseError("Redis refused to give a value")
        if line != expected:
            return False
        _fill(source, memory)
        _fill(source, memoryview(bytearray(2)))
    except OSError as error:
        message = f"the connection broke while a value was read: {error}"
        raise redis.ConnectionError(message) from error
    return True


def _fill(source: socket.socket, memory: memoryview) -> None:
    position = 0
    while position < memory.nbytes:
        count = source.recv_into(memory[position:])
        if count == 0:
            raise ConnectionError("it was closed")
        position += count
