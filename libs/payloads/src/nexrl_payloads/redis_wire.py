"""Large values over redis-py's connections, sent from and received into the caller's own memory.

redis-py copies a value that it sends or receives two to three times, into fresh pages. Reading
needs the connection's socket, for which redis-py (8.1) has no public name: ``_sock``. Bytes that
its parser had taken already would be missed, but a connection from the pool has none: redis-py
drops one that has.
"""

from __future__ import annotations

import socket

import redis
from redis.connection import Connection

from .redis_client import KEY_TTL_S, redis_errors


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


def receive_value(connection: Connection, memory: memoryview) -> bool:
    """Receive the bulk string that answers a command into ``memory``; False if it has another
    length.

    After False or an exception (a RedisError) answers may be left on the connection: it must be
    closed.
    """
    source: socket.socket = connection._sock  # type: ignore[assignment]
    expected = b"$%d\r\n" % memory.nbytes
    try:
        line = _line(source, len(expected))
        if line != expected:
            if line.startswith(b"-"):
                raise redis.ResponseError("Redis refused to give a value")
            return False
        _fill(source, memory)
        _fill(source, memoryview(bytearray(2)))
    except OSError as error:
        raise redis.ConnectionError(
            f"the connection broke while a value was read: {error}"
        ) from error
    return True


def _line(source: socket.socket, length: int) -> bytes:
    """The answer's first line, if it has at most ``length`` bytes; else the first ``length`` bytes
    of it."""
    line = b""
    while len(line) < length and b"\n" not in line:
        more = source.recv(length - len(line))
        if not more:
            raise ConnectionError("it was closed")
        line += more
    return line


def _fill(source: socket.socket, memory: memoryview) -> None:
    position = 0
    while position < memory.nbytes:
        count = source.recv_into(memory[position:])
        if count == 0:
            raise ConnectionError("it was closed")
        position += count
