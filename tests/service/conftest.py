"""One whole stack for the folder: real Redis, gateway, agent, ranks and checkpointer, and a tiny
model to train."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nexrl_client import HTTPTrainServiceClient
from transformers import AutoModelForCausalLM, Qwen2Config

from tests.helpers.servers import wait_until
from tests.helpers.service import VOCABULARY, StartGroup, leftovers
from tests.helpers.stack import Stack


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack with eight slots: all groups of a module together leave two."""
    stack = Stack(tmp_path_factory.mktemp("service") / "data", "--slots", "8")
    try:
        yield stack.until_ready()
    finally:
        assert stack.stop() == 0
        assert not stack.processes()


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test leaves neither payloads of requests nor staging folders nor lasting keys behind."""
    yield
    if "stack" in request.fixturenames:
        stack = request.getfixturevalue("stack")
        wait_until(lambda: leftovers(stack) == [], 20, f"the end of {leftovers(stack)}")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 with random weights: biases, grouped heads, tied embeddings."""
    return make_model(tmp_path_factory.mktemp("model") / "tiny", seed=0)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same form with other weights, surer of its tokens: what a teacher holds."""
    return make_model(tmp_path_factory.mktemp("model") / "other", seed=5, initializer_range=0.2)


def make_model(folder: Path, seed: int, **more: Any) -> Path:
    """Write a tiny Qwen2."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **more,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def start_group(stack: Stack, tiny_model: Path) -> StartGroup:
    """start_group("student", world_size=2, role="actor", lr=1e-3): a client of a group that holds
    the tiny model."""

    def start(
        identifier: str, *, world_size: int = 1, role: str = "actor", **actor: Any
    ) -> HTTPTrainServiceClient:
        client = HTTPTrainServiceClient(stack.url, identifier)
        config = {"actor": {"model": {"path": str(tiny_model)}, "optim": {"lr": 1e-3}, **actor}}
        client.initialize_worker(config_dict=config, role=role, world_size=world_size)
        client.init_model()
        return client

    return start


@pytest.fixture(scope="session")
def student(start_group: StartGroup) -> HTTPTrainServiceClient:
    """The group that most tests share: two ranks. Tests say what they change, none relies on the
    weights of another."""
    return start_group("student", world_size=2)


@pytest.fixture(scope="module")
def teacher(start_group: StartGroup, other_model: Path) -> Iterator[HTTPTrainServiceClient]:
    """One rank, forward only."""
    client = start_group("teacher", role="teacher", model={"path": str(other_model)})
    yield client
    client.destroy()
