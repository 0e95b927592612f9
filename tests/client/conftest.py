"""Fixtures of the client's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from nexrl_client import HTTPTrainServiceClient

from tests.helpers.scripted_server import ScriptedServer


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    scripted = ScriptedServer()
    yield scripted
    scripted.close()


@pytest.fixture
def client(server: ScriptedServer) -> Iterator[HTTPTrainServiceClient]:
    with HTTPTrainServiceClient(server.url, "student", request_timeout=10) as made:
        yield made


@pytest.fixture
def batch() -> dict[str, Any]:
    """B = 4, S = 6, R = 3."""
    ids = np.arange(24).reshape(4, 6)
    return {
        "tensors": {
            "input_ids": ids,
            "attention_mask": np.ones((4, 6), np.int32),
            "loss_mask": np.ones((4, 6), bool),
            "responses": ids[:, 3:],
            "prompts": ids[:, :3],
        },
        "values": {"uid": ["a", "b", "c", "d"]},
        "metadata": {"temperature": 0.7},
    }
