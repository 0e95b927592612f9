"""Fixtures that every part shares."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import redis

from tests.helpers.servers import RedisServer, wait_until, working_below

# The tests ask for more ranks than a machine has GPUs, and for the bits of a CPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Threads that wait for each other at every operation of a tiny model cost more than they save.
# Ranks of a stack have their own.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """After the last test nothing runs that works in a folder of the tests or for one."""
    folder = tmp_path_factory.getbasetemp()
    yield

    # What a test has killed takes its children along, a moment later.
    wait_until(lambda: not working_below(folder), 10, "the end of the tests' processes")


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One server for the session; tests that kill a server make their own :class:`RedisServer`.

    It never starts again, so it writes nothing: a busy disk would hold up every command for
    seconds.
    """
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start("--appendonly", "no")
    yield server
    server.kill()


@pytest.fixture
def redis_url(redis_server: RedisServer) -> Iterator[str]:
    """The session's server, emptied before the test."""
    client = redis.Redis.from_url(redis_server.url)
    client.flushall()
    yield redis_server.url
    client.close()
