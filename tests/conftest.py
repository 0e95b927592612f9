"""Fixtures that every part shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis

from tests.helpers.servers import RedisServer, wait_until

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

    def left() -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if _works_below(folder, process)]

    # What a test has killed takes its children along, a moment later.
    wait_until(lambda: not left(), 10, "the end of the tests' processes")


def _works_below(folder: Path, process: psutil.Process) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        places = (process.cwd(), process.environ().get("NEXRL_DATA", "/"))
    except psutil.Error:
        return False
    return any(Path(place).is_relative_to(folder) for place in places)


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
