"""What operations answer besides the loss: costs, skipped steps, sampled weights, rows without
tokens, refused models."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from nexrl_contract.sections import RolloutCorrectionConfig
from nexrl_worker.training import InvalidValue
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForSequenceClassification

from tests.helpers.engines import SMALL, batch, planned, save_model
from tests.helpers.single_rank import build, update

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("loss", ["reinforce", "importance_sampling"])
def test_a_rollout_correction_weighs_by_the_old_log_probs_that_were_sent(
    path: str, loss: str
) -> None:
    """w = exp(old - rollout) whatever the loss reads: with a gap of 0.5 everywhere it is
    exp(0.5)."""
    rows = batch()
    rows.tensors["rollout_log_probs"] = rows.tensors["old_log_probs"] - 0.5
    correction = RolloutCorrectionConfig(mode="token_truncate", lower=0.0, upper=9.0)
    engine = build(path, policy_loss=loss, rollout_correction=correction)

    [result] = update(engine, rows)

    assert result.metrics["actor/rollout_weight_mean"] == pytest.approx(math.exp(0.5), rel=1e-6)
    assert result.metrics["actor/mismatch_kl"] == pytest.approx(-0.5, rel=1e-6)


def test_a_correction_over_several_steps_needs_old_log_probs(path: str) -> None:
    rows = batch()
    rows.tensors["rollout_log_probs"] = rows.tensors.pop("old_log_probs")
    correction = RolloutCorrectionConfig(mode="token_mask", lower=0.0, upper=2.0)
    engine = build(
        path, policy_loss="reinforce", rollout_correction=correction, ppo_mini_batch_size=3
    )

    with pytest.raises(InvalidValue, match="need old_log_probs"):
        update(engine, rows)


def test_a_step_without_anything_to_learn_still_says_its_norm_and_rate(path: str) -> None:
    """Three mini-batches of which one is masked: no entry of any list is missing."""
    rows = batch()
    rows.tensors["scoring_attention_mask"][3:5] = 0
    steps = update(build(path, ppo_mini_batch_size=2, shuffle=False, policy_loss="reinforce"), rows)
    results = [step.metrics for step in steps]

    masked = [result for result in results if not result["step_applied"]]
    assert all(result.keys() == results[0].keys() for result in results)
    assert all(result["actor/grad_norm"] == 0.0 and result["actor/lr"] == 0.01 for result in masked)


def test_seconds_are_those_of_the_operation(path: str) -> None:
    """Looking leaves nothing on the clock, and optim_step answers for its own time."""
    engine, rows = build(path), batch()
    metrics = engine.accumulate(*planned(engine, "forward_backward", rows)).metrics
    assert metrics["time/forward_s"] > 0 and metrics["time/step_s"] == 0

    step = engine.step()
    assert step["time/step_s"] > 0 and step["time/forward_s"] == 0 and step["memory/peak_mib"] > 0

    engine.compute(*planned(engine, "compute_log_prob", rows))
    assert set(engine._trainer._clock.seconds().values()) == {0.0}  # type: ignore[union-attr]


@pytest.mark.parametrize("micro", [None, 1, 2, 3])
@pytest.mark.parametrize("packing", [False, True])
def test_a_row_without_tokens_has_reward_zero(
    tmp_path: Path, micro: int | None, packing: bool
) -> None:
    """Such rows pad a batch; another row's score must not stand in their place, however the rows
    are cut."""
    torch.manual_seed(0)
    made = Qwen2Config(**SMALL, num_labels=1, tie_word_embeddings=True, pad_token_id=0)
    Qwen2ForSequenceClassification(made).save_pretrained(tmp_path)
    rows = batch()
    rows.tensors["attention_mask"][2] = 0
    engine = build(str(tmp_path), "reward", ppo_micro_batch_size_per_gpu=micro, packing=packing)

    parts = engine.compute(*planned(engine, "compute_rewards", rows)).answers["rewards"]

    found = {
        row: float(value)
        for indices, values in parts
        for row, value in zip(indices, values, strict=True)
    }
    assert found[2] == 0.0 and all(found[row] != 0.0 for row in found if row != 2)


def test_a_plan_of_a_model_with_few_positions(tmp_path: Path) -> None:
    """`explain` measures on rows that the model can take."""
    GPT2LMHeadModel(
        GPT2Config(vocab_size=61, n_embd=24, n_layer=2, n_head=2, n_positions=16)
    ).save_pretrained(tmp_path)
    rows = batch()
    engine = build(str(tmp_path), dtype="float32")

    plan = engine.explain(*planned(engine, "update_actor", rows), rows.lengths())

    assert plan["rows"] == rows.size and plan["peak_memory_mib"] > 0


def test_weights_of_another_shape_are_refused(path: str, tmp_path: Path) -> None:
    """An embedding with more rows than the vocabulary would be cut off without a word."""
    for file in Path(path).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.embed_tokens.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name][:19]])
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})

    with pytest.raises(InvalidValue, match="has shape"):
        build(str(tmp_path))
