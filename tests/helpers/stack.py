"""``nexrl up`` as a test runs it: on a folder of its own, with everything it started in view."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import requests

from tests.helpers.servers import wait_until, working_below

START_S = 60.0
STOP_S = 75.0


class Stack:
    """``nexrl up`` on a data folder; its processes are known by their environment and folder."""

    def __init__(self, data: Path, *options: str, prefix: tuple[str, ...] = ()) -> None:
        """``prefix`` is a command that runs its arguments in its own place."""
        self.data = data
        self._out = data.parent / f"{data.name}.out"
        self._err = data.parent / f"{data.name}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [
                    *prefix,
                    sys.executable,
                    "-m",
                    "nexrl_stack",
                    "up",
                    "--port",
                    "0",
                    "--data",
                    str(data),
                    *options,
                ],
                stdout=out,
                stderr=err,
                cwd=data.parent,
            )

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    @property
    def url(self) -> str:
        return self.out.split()[-1]

    def until_ready(self) -> Stack:
        """Wait for the line on standard output."""
        wait_until(
            lambda: self.out or self.process.poll() is not None, START_S, "the line `nexrl ready`"
        )
        assert self.process.poll() is None, self.err
        return self

    def processes(self) -> list[psutil.Process]:
        """Everything that runs on the data folder, besides ``nexrl up`` itself."""
        return [each for each in working_below(self.data) if each.pid != self.process.pid]

    def running(self, module: str) -> list[psutil.Process]:
        """Those whose command line contains ``module``."""
        return [process for process in self.processes() if module in _command(process)]

    def process_of(self, module: str) -> psutil.Process:
        """The one process whose command line contains ``module``."""
        found = self.running(module)
        assert len(found) == 1, found
        return found[0]

    @property
    def redis_url(self) -> str:
        """Where its Redis answers."""
        return str(self.process_of("nexrl_gateway").environ()["NEXRL_REDIS_URL"])

    def status(self) -> dict[str, object]:
        answer: dict[str, object] = requests.get(f"{self.url}/health", timeout=5).json()
        return answer

    def stop(self, number: int = signal.SIGINT) -> int:
        """Ask it to stop; its exit status."""
        self.process.send_signal(number)
        return self.process.wait(STOP_S)


def _command(process: psutil.Process) -> str:
    """Its command line; empty where it has ended since it was listed."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
