"""The engine on 1, 2 and 4 ranks, against a plain loop written from the formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from nexrl_worker.training import fingerprint_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.helpers.engines import (
    batch,
    config,
    plain_scores,
    plain_training,
    relative_gap,
    save_model,
)
from tests.helpers.rank_processes import run_ranks

BASE: dict[str, Any] = {
    "entropy_coeff": 0.05, "use_kl_loss": True, "kl_loss_coef": 0.1, "ppo_mini_batch_size": 4,
    "optim": {"lr_warmup_steps": 2, "lr_scheduler": "cosine", "total_training_steps": 6, (
        "min_lr_ratio"
): 0.1},
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "token-mean": {"ppo_micro_batch_size_per_gpu": 3},
    "seq-mean-token-mean": {
        "ppo_micro_batch_size_per_gpu": 1,
        "loss_agg_mode": "seq-mean-token-mean",
        "recompute": True,
    },
    "seq-mean-token-sum": {
        "use_dynamic_bsz": True,
        "ppo_max_token_len_per_gpu": 24,
        "loss_agg_mode": "seq-mean-token-sum",
    },
    "llama": {"grad_clip": 0.05},
}
# lr 0.01: two warm-up steps, then a cosine over the four left, whose floor is a tenth.
RATES = [0.005, 0.01, 0.01, 0.01 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    cases = {}
    for name, changes in CASES.items():
        path = save_model(folder / f"model-{name}", "llama" if name == "llama" else "qwen2")
        cases[name] = {"path": path, "config": {**BASE, **changes}}
    (folder / "cases.json").write_text(json.dumps(cases))
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, dict[str, Any]]:
    cases = json.loads((folder / "cases.json").read_text())
    return {
        name: plain_training(case["path"], batch(), config(case["path"], **case["config"]), RATES)
        for name, case in cases.items()
    }


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_training_is_the_plain_loop(
    folder: Path, plain: dict[str, dict[str, Any]], world_size: int
) -> None:
    """Four AdamW steps give the plain loop's weights and gradient norms, however rows and tokens
    are cut."""
    answer = run_ranks(world_size, "training", folder, str(folder / "cases.json"))
    for name, wanted in plain.items():
        found = load_file(folder / f"{name}-{world_size}.safetensors")
        assert found.keys() == wanted["end"].keys()
        assert relative_gap(found, wanted["end"], wanted["start"]) <= 1e-9, name
        norms = [norm for result in answer[name] for norm in result["actor/grad_norm"]]
        assert norms == pytest.approx(wanted["norms"], rel=1e-9), name
        assert [rate for result in answer[name] for rate in result["actor/lr"]] == pytest.approx(
            RATES, rel=1e-12
        )


@pytest.fixture(scope="module")
def facts(folder: Path) -> dict[int, dict[str, Any]]:
    path = str(folder / "model-token-mean")
    return {world: run_ranks(world, "behaviour", folder, path) for world in (2, 1)}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
class TestFacts:
    def test_one_row(self, facts: dict[int, dict[str, Any]], world_size: int) -> None:
        """A batch of one row trains, on two ranks as on one."""
        result = facts[world_size]["one_row"]
        assert result["step_applied"] is True and result["actor/rows"] == 1
        assert result["actor/loss"] == pytest.approx(facts[1]["one_row"]["actor/loss"], rel=1e-12)

    def test_all_masked(self, facts: dict[int, dict[str, Any]], world_size: int) -> None:
        """A mini-batch without a scored token takes no step and says so; its numbers are 0, not
        NaN."""
        result = facts[world_size]["all_masked"]
        assert result["step_applied"] is False and result["skipped"] == "nothing_to_learn"
        assert result["actor/loss"] == 0.0 and facts[world_size]["all_masked_unchanged"]

    def test_masked_nan(
        self, folder: Path, facts: dict[int, dict[str, Any]], world_size: int
    ) -> None:
        """NaN under the mask changes no bit of the gradients."""
        plain, poisoned = (
            load_file(folder / f"masked-{kind}-{world_size}.safetensors")
            for kind in ("plain", "poisoned")
        )
        assert all(torch.equal(plain[name], poisoned[name]) for name in plain)
        assert any(value.abs().max() > 0 for value in plain.values())

    def test_halves(self, folder: Path, facts: dict[int, dict[str, Any]], world_size: int) -> None:
        """Two forward_backward and one optim_step equal one update_actor on the rows put together.

        Up to the rounding of Qwen2's norms, which compute in float32 whatever the dtype: one way
        divides by the denominator before the backward, the other at the step.
        """
        halves, whole = (
            load_file(folder / f"{kind}-{world_size}.safetensors") for kind in ("halves", "whole")
        )
        start = load_file(folder / "model-token-mean" / "model.safetensors")
        assert (
            relative_gap(halves, whole, {name: value.double() for name, value in start.items()})
            <= 1e-5
        )
        fact = facts[world_size]
        assert fact["pending"] and fact["optim_step"]["actor/grad_norm"] == pytest.approx(
            fact["whole"]["actor/grad_norm"], rel=1e-6
        )
        assert sum(half["actor/tokens"] for half in fact["halves"]) == fact["whole"]["actor/tokens"]

    def test_not_finite(self, facts: dict[int, dict[str, Any]], world_size: int) -> None:
        """A gradient that is not finite skips the step and changes no weight, moment or schedule on
        any rank."""
        result = facts[world_size]["not_finite"]
        assert (
            result["step_applied"] is False
            and result["skipped"] == "non_finite_gradient"
            and result["unchanged"]
        )

    def test_refused(self, facts: dict[int, dict[str, Any]], world_size: int) -> None:
        """Bad values are refused by name and row, by the rank that reads them; nothing changes and
        the group goes on."""
        refused = facts[world_size]["refused"]
        nan, wrong_id, mask = (
            [error for error in refused[kind] if error] for kind in ("nan", "id", "mask")
        )
        assert [(e["tensor"], e["row"], e["actual"]) for e in nan] == [("advantages", 4, "nan")]
        assert [(e["tensor"], e["row"], e["actual"]) for e in wrong_id] == [("input_ids", 4, "61")]
        assert [(e["tensor"], e["row"], e["expected"]) for e in mask] == [
            ("attention_mask", 4, "0 or 1")
        ]
        assert all(
            error["tensor"] == "advantages" and error["actual"] == "[7, 5]"
            for error in refused["shape"]
        )
        assert all("temperature" in error["message"] for error in refused["temperature"])
        assert all(error["actual"] == "missing" for error in refused["missing"])
        assert refused["unchanged"] == [True] and refused["goes_on"] == [True]

    def test_reference(
        self, folder: Path, facts: dict[int, dict[str, Any]], world_size: int
    ) -> None:
        """compute_ref_log_prob scores with the weights on disk, however far training has gone."""
        model = AutoModelForCausalLM.from_pretrained(
            folder / "model-token-mean", dtype=torch.float64
        )
        with torch.no_grad():
            wanted, _ = plain_scores(model, batch())
        fact = facts[world_size]
        assert fact["reference"]["moved"] > 1e-3
        assert torch.tensor(fact["reference"]["frozen"]).allclose(wanted.float(), atol=1e-6)
        assert torch.tensor(fact["teacher"]["scores"]).allclose(wanted.float(), atol=1e-6)

    def test_teacher(self, facts: dict[int, dict[str, Any]], world_size: int) -> None:
        """A teacher has no optimizer and no gradients, and refuses to train."""
        fact = facts[world_size]["teacher"]
        assert "does not train" in fact["update"] and not fact["trainable"]
        assert fact["shards"] < facts[world_size]["info"]["parameters"] / 2 and fact["shards"] == 26

    def test_first_ratio(self, facts: dict[int, dict[str, Any]], world_size: int) -> None:
        """The first optimizer step after compute_log_prob starts at a ratio of exactly 1."""
        for result in facts[world_size]["first_ratio"]:
            ratio, apart = result["actor/ratio_mean"], result["actor/ppo_kl"]
            first = (ratio[0], apart[0]) if isinstance(ratio, list) else (ratio, apart)
            assert first == (1.0, 0.0)

    def test_resume(self, folder: Path, facts: dict[int, dict[str, Any]], world_size: int) -> None:
        """State saved by two ranks loads at any world size, and training goes on the same."""
        resumed, kept = (
            load_file(folder / f"resumed-{world}.safetensors") for world in (world_size, 2)
        )
        assert all(torch.allclose(resumed[name], kept[name], rtol=0, atol=1e-13) for name in kept)
        assert facts[world_size]["state"]["scalars"]["optimizer_steps"] == 2

    def test_distillation(self, facts: dict[int, dict[str, Any]], world_size: int) -> None:
        """Two teachers give two gradients, through REINFORCE and through importance sampling."""
        norms = [result["actor/grad_norm"] for result in facts[world_size]["distillation"]]
        assert abs(norms[0] - norms[2]) > 1e-3 and abs(norms[1] - norms[3]) > 1e-3
        assert norms == pytest.approx(
            [result["actor/grad_norm"] for result in facts[1]["distillation"]], rel=1e-9
        )


@pytest.mark.slow
def test_fingerprint(folder: Path, facts: dict[int, dict[str, Any]]) -> None:
    """One fingerprint at world size 1 and 2, equal to the exported folder's, changed by a step."""
    first, second = facts[1]["fingerprints"]
    assert facts[2]["fingerprints"][0] == first and first != second
    weights = load_file(folder / "model-token-mean" / "model.safetensors")
    assert fingerprint_of((name, value.double()) for name, value in weights.items()) == int(first)
    name = next(iter(weights))
    weights[name].view(-1)[0] += 1e-7
    assert fingerprint_of((name, value.double()) for name, value in weights.items()) != int(first)


@pytest.mark.slow
def test_export_names(folder: Path, facts: dict[int, dict[str, Any]]) -> None:
    """full_weights yields the names and shapes that transformers saves: a tied head once."""
    exported = load_file(folder / "whole-2.safetensors")
    saved = load_file(folder / "model-token-mean" / "model.safetensors")
    assert {name: value.shape for name, value in exported.items()} == {
        name: value.shape for name, value in saved.items()
    }
