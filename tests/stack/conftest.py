"""``nexrl up`` in a folder of the test's own, and the rest of the command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.stack import Stack

StartStack = Callable[..., Stack]


def kill(stack: Stack) -> None:
    """End it at once; what it started dies with it."""
    if stack.process.poll() is None:
        stack.process.kill()
        stack.process.wait()


@pytest.fixture
def start_stack(tmp_path: Path) -> Iterator[StartStack]:
    """start_stack(*options, data=...) runs ``nexrl up``; whatever is left at the end is killed."""
    started: list[Stack] = []

    def start(*options: str, data: Path | None = None) -> Stack:
        stack = Stack(data or tmp_path / "data", *options)
        started.append(stack)
        return stack

    yield start
    for stack in started:
        kill(stack)


@pytest.fixture(scope="package")
def shared_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One stack with three slots for the tests that change nothing."""
    stack = Stack(tmp_path_factory.mktemp("shared") / "data", "--slots", "3")
    try:
        yield stack.until_ready()
    finally:
        kill(stack)


@pytest.fixture
def nexrl() -> Callable[..., subprocess.CompletedProcess[str]]:
    """nexrl(*arguments): one run of the command line to its end."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "nexrl_stack", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run
