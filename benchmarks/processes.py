"""Child processes of a run: started with a log of their own, stopped by their ids, dead when the
run dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nexrl_host.processes import die_with_parent

START_S = 90.0


class Child:
    """A process whose output goes to ``log``; with ``talks`` its input and output are pipes of text
    lines."""

    def __init__(
        self,
        argv: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
        *,
        talks: bool = False,
    ) -> None:
        self._log = log
        with log.open("ab") as file:
            self.process: subprocess.Popen[str] = subprocess.Popen(
                list(argv),
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else file,
                stderr=file,
                env={**os.environ, **(env or {})},
                text=True,
                preexec_fn=die_with_parent,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def ask(self, line: str) -> str:
        """Send a line, wait for one."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.listen()

    def listen(self) -> str:
        """The next line it says; raises RuntimeError with its log when it has ended instead."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait(10)
            raise RuntimeError(
                f"{self._log.name} ended with {self.process.returncode}: {self.tail()}"
            )
        return line.strip()

    def tail(self) -> str:
        """The last lines of its log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])

    def until(self, look: Callable[[], Any], what: str) -> None:
        """Wait for ``look``; raises RuntimeError with the log when the process ends or takes too
        long."""
        deadline = time.monotonic() + START_S
        while not look():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{what} did not come: {self.tail()}")
            time.sleep(0.05)

    def stop(self, number: int = signal.SIGTERM, grace_s: float = 60.0) -> None:
        """Ask it to end, then end it."""
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(grace_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class Children(ExitStack):
    """The children of one part of the run; leaving the block stops them, the last started first."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def start(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        *,
        talks: bool = False,
        signal_number: int = signal.SIGTERM,
    ) -> Child:
        """Start one; its log is ``name``.log."""
        child = Child(argv, self.folder / f"{name}.log", env, talks=talks)
        self.callback(child.stop, signal_number)
        return child


def module(name: str, *arguments: str) -> list[str]:
    """The command line of a Python module."""
    return [sys.executable, "-m", name, *arguments]


def free_port() -> int:
    """A TCP port of loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    """Whether anything answers at a TCP port of loopback."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0
