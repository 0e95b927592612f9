"""One stack for the demo's runs. The examples are programs, not packages: tests import their
modules by folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.stack import Stack

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parents[1] / "examples")]


@pytest.fixture(scope="package")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack with two slots: every run must give its slots back before the next."""
    stack = Stack(tmp_path_factory.mktemp("demo") / "data", "--slots", "2")
    try:
        yield stack.until_ready()
    finally:
        assert stack.stop() == 0
