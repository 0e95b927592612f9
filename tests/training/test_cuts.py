"""The same result however the work is cut: random losses, batches and cuts on 1, 2 and 4 ranks
against a plain loop.

Bounds in float64: gradients, gradient norms and every metric to 1e-9, weights after at least three
AdamW steps to 1e-9 of the update. In float32: gradients and norm of the first step to 1e-5, weights
to 1e-3 of the update.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForTokenClassification

from tests.helpers.engines import SMALL, relative_gap, save_model
from tests.helpers.loss_cases import LOSSES, Case, drawn, make, plain
from tests.helpers.plain_loop import Trained
from tests.helpers.rank_processes import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
Ran = tuple[dict[str, Case], dict[str, Any]]
WORLDS = (1, 2, 4)
DRAWS = 2
DRAWN = {
    "float64": (list(LOSSES), DRAWS),
    "float32": (["ppo", "gspo", "distillation-forward", "critic", "cispo", "linear"], len(WORLDS)),
}
"""By dtype: the variants, and how many draws of each."""


def save_critic(folder: Path) -> str:
    """A tiny Qwen2 with a value head that is not zero."""
    torch.manual_seed(5)
    Qwen2ForTokenClassification(
        Qwen2Config(**SMALL, num_labels=1, tie_word_embeddings=True)
    ).save_pretrained(folder)  # type: ignore[arg-type]
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuts")
    save_model(folder / "actor")
    save_critic(folder / "critic")
    return folder


def cases_of(folder: Path, world: int, dtype: str) -> dict[str, Case]:
    """Some draws of each variant that fall to this world size; over the draws a variant meets
    several."""
    found = {}
    variants, count = DRAWN[dtype]
    draws = iter(drawn(len(variants) * count, first=11 if dtype == "float64" else 12))
    for number in range(count):
        for position, variant in enumerate(variants):
            draw = next(draws)
            if WORLDS[(position + number) % len(WORLDS)] != world:
                continue
            name = f"{dtype}-{variant}-{number}"
            path = str(folder / ("critic" if variant == "critic" else "actor"))
            found[name] = make(folder, name, variant, draw, path, dtype)
    return found


@pytest.fixture(scope="module", params=WORLDS)
def ran(folder: Path, request: pytest.FixtureRequest) -> Ran:
    """The cases of a world size, of both dtypes, and what its ranks answer: they start once."""
    world: int = request.param
    cases = {name: case for dtype in DRAWN for name, case in cases_of(folder, world, dtype).items()}
    file = folder / f"orders-{world}.json"
    file.write_text(json.dumps({key: case.order for key, case in cases.items()}))
    return cases, run_ranks(world, "cases", folder, str(file), program="cuts")


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Relative L2 distance of two sets of tensors; absolute where all that is wanted is 0 (every
    weight rejected)."""
    assert found.keys() == wanted.keys()
    apart = math.fsum(
        float((found[name].double() - wanted[name]).square().sum()) for name in wanted
    )
    return math.sqrt(
        apart / (math.fsum(float(value.square().sum()) for value in wanted.values()) or 1.0)
    )


def step_of(tensors: dict[str, Tensor], step: int | str) -> dict[str, Tensor]:
    return {
        key.split("/", 1)[1]: value for key, value in tensors.items() if key.startswith(f"{step}/")
    }


def compare(
    case: Case, answer: dict[str, Any], tensors: dict[str, Tensor], wanted: Trained
) -> dict[str, float]:
    """The worst relative deviations: of gradients, weights (of the update), gradient norms and all
    other metrics."""
    prefix = "critic" if case.order["role"] == "critic" else "actor"
    gaps = [distance(step_of(tensors, step), grads) for step, grads in enumerate(wanted.gradients)]
    worst = {
        "first_gradient": gaps[0],
        "gradient": max(gaps),
        "norm": 0.0,
        "first_norm": 0.0,
        "metric": 0.0,
    }
    for step, (found, numbers) in enumerate(zip(answer["metrics"], wanted.metrics, strict=True)):
        if numbers is None:
            assert found["step_applied"] is False and found["skipped"] == "nothing_to_learn"
            continue
        assert found["step_applied"] is True
        for name, value in numbers.items():
            gap = abs(found[f"{prefix}/{name}"] - value) / max(abs(value), 1e-3)
            kind = "norm" if name == "grad_norm" else "metric"
            worst[kind] = max(worst[kind], gap)
            if kind == "norm" and step == 0:
                worst["first_norm"] = gap
    worst["weights"] = relative_gap(step_of(tensors, "end"), wanted.end, wanted.start)
    return worst


def all_compared(folder: Path, ran: Ran, dtype: str) -> dict[str, dict[str, float]]:
    cases, answers = ran
    found = {}
    for name, case in cases.items():
        if not name.startswith(dtype):
            continue
        answer = answers[name]
        assert len(answer["orders"]) >= 3 and (
            answer["packing"] or not case.order["config"]["packing"]
        )
        check_order(case, answer["orders"])
        wanted = plain(case, answer["orders"])
        found[name] = compare(case, answer, load_file(folder / f"{name}.safetensors"), wanted)
    return found


def check_order(case: Case, orders: list[list[int]]) -> None:
    """Every epoch steps over each row once, `ppo_mini_batch_size` rows at a time, in order unless
    shuffled."""
    settings, size = case.order["config"], case.rows.size
    step = settings["ppo_mini_batch_size"] or size
    usual = [list(range(at, min(at + step, size))) for at in range(0, size, step)]
    assert len(orders) == len(usual) * settings["ppo_epochs"] * case.order["calls"]
    for at in range(0, len(orders), len(usual)):
        epoch = orders[at : at + len(usual)]
        assert sorted(row for rows in epoch for row in rows) == list(range(size))
        assert list(map(len, epoch)) == list(map(len, usual)) and (
            settings["shuffle"] or epoch == usual
        )


def test_float64(folder: Path, ran: Ran) -> None:
    """Any loss, any cut: the plain loop's gradients, norms, metrics and weights to 1e-9."""
    found = all_compared(folder, ran, "float64")
    assert len(found) >= len(LOSSES) * DRAWS // len(WORLDS)
    assert not {name: worst for name, worst in found.items() if max(worst.values()) > 1e-9}


def test_float32(folder: Path, ran: Ran) -> None:
    """The same in float32: the first step's gradients and norm to 1e-5 of the float64 loop, weights
    to 1e-3."""
    found = all_compared(folder, ran, "float32")
    assert len(found) == len(DRAWN["float32"][0])
    for name, worst in found.items():
        assert max(worst["first_gradient"], worst["first_norm"]) <= 1e-5, (name, worst)
        assert worst["weights"] <= 1e-3, (name, worst)
