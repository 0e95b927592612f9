"""The trainer's local copy builds batches as the service reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import END, PAD, make_tiny_model
from policy import LocalPolicy
from task import MinMaxTask


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", MinMaxTask.words)


@pytest.fixture
def policy(model: Path) -> LocalPolicy:
    return LocalPolicy(model, max_new_tokens=3)


def test_the_saved_tokenizer_reads_every_word_of_the_task(policy: LocalPolicy) -> None:
    assert policy.tokenizer.decode(policy.tokenizer("min 0 9 =").input_ids) == "min 0 9 ="
    assert (
        len({policy.tokenizer(word).input_ids[0] for word in (PAD, END, *MinMaxTask.words)}) == 15
    )


def test_prompts_are_padded_left_answers_right_and_only_answers_are_trained_on(
    policy: LocalPolicy,
) -> None:
    shown = policy.demonstrate(["max 1 2 =", "="], ["7 8", "9"])
    assert shown.tensors["attention_mask"].tolist() == [
        [1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 1, 1, 1, 0],
    ]
    assert shown.tensors["loss_mask"].tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 0]]
    assert shown.tensors["position_ids"][1, 3:6].tolist() == [0, 1, 2]
    assert torch.equal(shown.tensors["input_ids"][:, 4:], shown.tensors["responses"])
    assert shown.texts == ["7 8", "9"]
    assert shown.tokens == 10


def test_answers_of_one_prompt_stand_in_a_row(policy: LocalPolicy) -> None:
    rollout = policy.answer(["max 1 2 3 =", "min 1 2 3 ="], samples=4)
    operations = rollout.tensors["input_ids"][:, 0].tolist()
    assert len(set(operations[:4])) == len(set(operations[4:])) == 1
    assert operations[0] != operations[4]
    assert len(rollout.texts) == 8


def test_sampling_draws_from_the_model_at_temperature_one(policy: LocalPolicy) -> None:
    """No top-k or other cut: rare tokens come as often as the model says, or the importance ratios
    would lie."""
    torch.manual_seed(0)
    rollout = policy.answer(["max 1 2 3 ="], samples=4000)
    drawn = torch.bincount(rollout.tensors["responses"][:, 0], minlength=15) / 4000
    with torch.no_grad():
        logits = policy.model(rollout.tensors["input_ids"][:1, :5]).logits[0, -1]
    assert torch.allclose(drawn, logits.softmax(-1), atol=0.03)


def test_refresh_takes_the_published_weights_and_refuses_another_model(
    policy: LocalPolicy, tmp_path: Path
) -> None:
    published = tmp_path / "sync"
    published.symlink_to(make_tiny_model(tmp_path / "v1", MinMaxTask.words, seed=1))
    policy.refresh(published)
    expected = LocalPolicy(published, 1).model.state_dict()
    assert all(
        torch.equal(value, expected[name]) for name, value in policy.model.state_dict().items()
    )

    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="another model"):
        policy.refresh(tmp_path / "empty")
