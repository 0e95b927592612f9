"""A real Redis-compatible server, free ports, and waiting without sleeping."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
import redis
from nexrl_host.processes import die_with_parent
from nexrl_stack.embedded_redis import redis_service

Seen = TypeVar("Seen")


def free_port() -> int:
    """A TCP port on loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def wait_until(
    look: Callable[[], Seen],
    timeout_s: float = 10.0,
    what: str = "the condition",
    every_s: float = 0.01,
) -> Seen:
    """The first true value of ``look``, asked every ``every_s``; fails with what it saw last."""
    deadline = time.monotonic() + timeout_s
    while True:
        seen = look()
        if seen:
            return seen
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not come within {timeout_s} s; last seen: {seen!r}")
        time.sleep(every_s)


def working_below(folder: Path) -> list[psutil.Process]:
    """The processes that work in ``folder``, or on a data folder in it.

    Redis rewrites its command line and environment, but it works in its folder.
    """
    return [process for process in psutil.process_iter() if _works_below(folder, process)]


def _works_below(folder: Path, process: psutil.Process) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        data = Path(process.environ().get("NEXRL_DATA", "/"))
        return data.is_relative_to(folder) or Path(process.cwd()).is_relative_to(folder)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


class RedisServer:
    """A valkey server of its own on a free port, which a test may kill and start again with its
    data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        """Start it and wait until it answers."""
        self._process = subprocess.Popen(
            [*redis_service(self.folder, self.port).argv, *options],
            stdout=subprocess.DEVNULL,
            preexec_fn=die_with_parent,
        )
        client = redis.Redis.from_url(self.url)
        wait_until(lambda: _answers(client), 10, "the Redis server")
        client.close()

    def kill(self) -> None:
        """End it at once, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.exceptions.RedisError:
        return False
