"""What the tests of the worker agent share."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.agent import Agents, save_model
from tests.helpers.servers import wait_until


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(folder)
    return folder


@pytest.fixture
def agents(tmp_path: Path, redis_url: str) -> Iterator[Agents]:
    """An agent's folder and Redis; afterwards no rank may be left."""
    (tmp_path / "data").mkdir()
    agents = Agents(tmp_path / "data", redis_url)
    yield agents
    if agents.process is not None:
        agents.stop(signal.SIGKILL)
    wait_until(lambda: not agents.ranks(), 10, "the end of every rank")
    agents.ledger.client.close()
