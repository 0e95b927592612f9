"""A real language model: converted once, then trained through the service."""

from __future__ import annotations

import json

import pytest
from models import smollm2_folder
from policy import LocalPolicy

from tests.helpers.demo_runs import log_of, run_demo, same_weights
from tests.helpers.stack import Stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


# gguf reads its own constants with a call that numpy has deprecated
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_smollm2_becomes_an_ordinary_folder_once() -> None:
    folder = smollm2_folder()
    converted = (folder / "model.safetensors").stat()
    config = json.loads((folder / "config.json").read_text())

    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"]
    assert "quantization_config" not in config
    [answer] = (
        LocalPolicy(folder, max_new_tokens=12)
        .answer(["What is the capital of France?"], greedy=True)
        .texts
    )
    assert "Paris" in answer
    assert smollm2_folder() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == converted.st_mtime_ns


def test_a_step_of_smollm2_changes_its_weights_and_shows_its_answers(stack: Stack) -> None:
    """Exit 1 is right here: one step need not reach the target."""
    done, folder = run_demo(stack, "smollm2", "--model", "smollm2", "--steps", "1")

    assert done.returncode in (0, 1), done.stdout + done.stderr
    assert "Sampled answers" in done.stdout, done.stderr
    assert "What is the capital of" in done.stdout
    [step] = log_of(folder, "GRPO")
    assert 0 < step["reward"] < 1
    assert not same_weights(smollm2_folder(), folder / "sync")
