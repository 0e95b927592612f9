"""What `explain` says of an update, against what the update then does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma2Config, Gemma2ForCausalLM

from tests.helpers.engines import save_model
from tests.helpers.rank_processes import run_ranks

CUTS: dict[str, dict[str, Any]] = {
    "one micro-batch": {},
    "mini-batches of three rows": {"ppo_mini_batch_size": 5, "ppo_micro_batch_size_per_gpu": 2},
    "packed, by tokens": {
        "packing": True,
        "use_dynamic_bsz": True,
        "ppo_max_token_len_per_gpu": 700,
    },
    "layers again in the backward": {"recompute": True},
}


OWN_LOGITS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float64": {"dtype": "float64"},
    "layers again in the backward": {"recompute": True},
}
# Large tensors go back to the system when they are freed: else the peak hangs on where malloc finds
# room, by a tenth and more.
STEADY = {"MALLOC_MMAP_THRESHOLD_": str(1024 * 1024)}
SIZES = {"vocab_size": 8192, "hidden_size": 320, "intermediate_size": 960, "num_hidden_layers": 6}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("explain")
    return save_model(folder, max_position_embeddings=512, initializer_range=0.02, **SIZES)


def explain(world_size: int, folder: Path, path: str, settings: dict[str, Any]) -> Any:
    """What the ranks of explain.py answer."""
    arguments = (path, json.dumps(settings))
    return run_ranks(world_size, "explain", folder, *arguments, program="explain", variables=STEADY)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("cut", CUTS, ids=list(CUTS))
def test_the_plan_is_what_happens(cut: str, world_size: int, path: str, tmp_path: Path) -> None:
    """Rows, tokens, padding and steps are those of the update; the peak is within a quarter;
    nothing has changed."""
    answer = explain(world_size, tmp_path, path, CUTS[cut])
    plan, results = answer["explained"], answer["results"]
    assert answer["unchanged"]
    assert (
        plan["rows"] == 10
        and sum(plan["rows_per_rank"]) == 10
        and len(plan["rows_per_rank"]) == world_size
    )
    assert len(plan["mini_batches"]) == len(results)
    assert plan["tokens"] == sum(answer["lengths"])
    for step, result in zip(plan["mini_batches"], results, strict=True):
        assert 1 - step["tokens"] / step["computed_tokens"] == pytest.approx(
            result["actor/padding_share"], abs=0.01
        )
        assert (
            step["rows"] == result["actor/rows"] and sum(step["tokens_per_rank"]) == step["tokens"]
        )
    measured = max(result["memory/peak_mib"] for result in results)
    assert plan["peak_memory_mib"] == pytest.approx(measured, rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("cut", OWN_LOGITS, ids=list(OWN_LOGITS))
def test_the_peak_of_a_family_with_logits_of_its_own(cut: str, tmp_path: Path) -> None:
    """Gemma 2 caps its logits, so that they are held whole: the estimate is within a quarter there,
    too."""
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 80,
        "max_position_embeddings": 512,
    }
    Gemma2ForCausalLM(Gemma2Config(**{**SIZES, "num_hidden_layers": 3}, **heads)).save_pretrained(
        tmp_path / "model"
    )
    answer = explain(1, tmp_path, str(tmp_path / "model"), OWN_LOGITS[cut])
    measured = max(result["memory/peak_mib"] for result in answer["results"])
    assert answer["explained"]["peak_memory_mib"] == pytest.approx(measured, rel=0.25)
