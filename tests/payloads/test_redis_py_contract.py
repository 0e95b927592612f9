"""``redis_wire`` speaks to the connections of redis-py 8's pool, beneath its commands: each method
that it calls must still do what it is called for."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import redis
from nexrl_payloads import redis_wire
from redis.connection import AbstractConnection, ConnectionPool


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    """As the store makes it."""
    with redis_wire.connect(redis_url) as found:
        yield found


@pytest.mark.parametrize(
    "name", ["send_command", "send_packed_command", "read_response", "disconnect"]
)
def test_a_connection_has_the_methods(name: str) -> None:
    assert callable(getattr(AbstractConnection, name))


@pytest.mark.parametrize("name", ["get_connection", "release"])
def test_a_pool_has_the_methods(name: str) -> None:
    assert callable(getattr(ConnectionPool, name))


def test_a_packed_command_is_sent_buffer_by_buffer(client: redis.Redis) -> None:
    """Nothing is joined, and a view of the caller's memory is sent as it is."""
    connection = client.connection_pool.get_connection()
    value = memoryview(bytearray(b"abc"))
    connection.send_packed_command([b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$3\r\n", value, b"\r\n"])
    assert connection.read_response() in (b"OK", True)
    client.connection_pool.release(connection)
    assert client.get("k") == b"abc"


def test_answers_are_read_from_the_connections_socket(client: redis.Redis) -> None:
    """It is a plain socket, and what the pool sends when it connects has been read to the end."""
    client.set("k", b"0123456789")
    connection = client.connection_pool.get_connection()
    assert isinstance(connection._sock, socket.socket)
    connection.send_command("GET", "k")
    assert connection._sock.recv(100) == b"$10\r\n0123456789\r\n"
    client.connection_pool.release(connection)
    assert client.get("k") == b"0123456789"


def test_answers_come_in_the_order_of_the_commands(client: redis.Redis) -> None:
    """Of several on their way at once each is one ``bytes``; an error is raised, and the ones
    behind it can still be read."""
    client.set("k", b"0123456789")
    client.lpush("list", "x")
    connection = client.connection_pool.get_connection()
    for key, first, last in (("k", 2, 4), ("none", 0, 1), ("list", 0, 1), ("k", 0, 0)):
        connection.send_command("GETRANGE", key, first, last)
    assert connection.read_response() == b"234"
    assert connection.read_response() == b""
    with pytest.raises(redis.ResponseError):
        connection.read_response()
    assert connection.read_response() == b"0"
    client.connection_pool.release(connection)


def test_a_connection_that_was_closed_is_opened_again(client: redis.Redis) -> None:
    """So one whose answers nobody will read can be given back to the pool."""
    connection = client.connection_pool.get_connection()
    connection.send_command("PING")
    connection.disconnect()
    client.connection_pool.release(connection)
    assert client.ping()
