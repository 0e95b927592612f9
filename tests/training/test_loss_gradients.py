"""Every loss, aggregation, KL type and rollout correction: value and slope against the formula, in
float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nexrl_contract.losses import LOSSES
from nexrl_worker.training.losses.aggregation import CORRECTIONS, MODES, Aggregation, Correction
from nexrl_worker.training.losses.formulas import (
    FUNCTIONS,
    KL_TYPES,
    Clip,
    kl_terms,
    select_tokens,
    value_loss,
)
from torch import Tensor

from tests.helpers.formulas import Loss, aggregate, correction, policy, weighted_divergence

STEP = 1e-6
SCALE = 6.5
JUNK = (float("nan"), float("inf"), -float("inf"))
MASK = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
VARIANTS = {
    "ppo": Loss("ppo", low=0.15, high=0.25),
    "ppo-dual": Loss("ppo", low=0.15, high=0.25, dual=1.4),
    "grpo": Loss("grpo"),
    "gspo": Loss("gspo", low=3e-4, high=4e-4),
    "gspo-wide": Loss("gspo", low=0.1, high=0.4),
    "cispo": Loss("cispo", low=None, high=0.3),
    "cispo-low": Loss("cispo", low=0.3, high=0.3),
    "importance_sampling": Loss("importance_sampling"),
    "reinforce": Loss("reinforce"),
    "cross_entropy": Loss("cross_entropy"),
    "linear": Loss("linear"),
}


def numbers(seed: int, spread: float = 1.0, around: Tensor | None = None) -> Tensor:
    """Of all tokens [4,5]; NaN and infinities where nothing is scored."""
    values = spread * torch.randn(
        MASK.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    values = values if around is None else around + values
    junk = (
        torch.tensor(list(itertools.islice(itertools.cycle(JUNK), MASK.numel())))
        .view(MASK.shape)
        .double()
    )
    return torch.where(MASK, values, junk)


LOG_PROBS = numbers(0, 0.8, torch.full(MASK.shape, -2.0).double())
BATCH = {
    "old_log_probs": numbers(1, 0.35, LOG_PROBS),
    "rollout_log_probs": numbers(2, 0.25, numbers(1, 0.35, LOG_PROBS)),
    "ref_log_prob": numbers(3, 0.6, LOG_PROBS),
    "advantages": numbers(4),
    "loss_weights": numbers(5),
    "returns": numbers(6),
    "values": numbers(7, 0.6, LOG_PROBS),
}


def rows(values: Tensor) -> list[Tensor]:
    """The scored tokens of every row."""
    return [line[picked] for line, picked in zip(values, MASK, strict=True)]


def with_others(number: int) -> dict[str, Tensor]:
    return {name: value[number][MASK[number]] for name, value in BATCH.items()}


def slope(value: Callable[[Tensor], float], at: Tensor) -> Tensor:
    """Central differences; nothing moves at masked tokens."""
    found = torch.zeros_like(at)
    for place in MASK.nonzero().tolist():
        up, down = at.clone(), at.clone()
        up[tuple(place)] += STEP
        down[tuple(place)] -= STEP
        found[tuple(place)] = (value(up) - value(down)) / (2 * STEP)
    return found


def agrees(
    made: Callable[[Tensor], Tensor], formula: Callable[[Tensor, Tensor], float], at: Tensor
) -> None:
    """The worker's `made` has the formula's value, and the slope that it has with its second
    argument held at `at`."""
    leaf = at.clone().requires_grad_()
    loss = made(leaf)
    loss.backward()
    assert leaf.grad is not None
    assert loss.item() == pytest.approx(formula(at, at), rel=1e-12, abs=1e-14)
    wanted = slope(lambda moved: formula(moved, at), at)
    assert wanted.abs().max() > 1e-3
    assert torch.allclose(leaf.grad, wanted, rtol=1e-7, atol=2e-9)
    assert leaf.grad[~MASK].abs().max() == 0


def ours(loss: Loss) -> Aggregation:
    mode = LOSSES[loss.name].aggregation or loss.mode
    return Aggregation(mode, loss.scale if mode.endswith("norm") else 1.0)


def over(aggregation: Aggregation, values: Tensor) -> Tensor:
    return aggregation.numerator(values, MASK) / aggregation.divisor(float(aggregation.count(MASK)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("old", [True, False], ids=["old", "no-old"])
def test_policy_losses(variant: str, mode: str, old: bool) -> None:
    """Value and gradient of every loss in every mode; without old_log_probs the ratio starts at
    1."""
    loss = Loss(**{**vars(VARIANTS[variant]), "mode": mode, "scale": SCALE})
    given = {name: value for name, value in BATCH.items() if old or name != "old_log_probs"}

    def made(log_probs: Tensor) -> Tensor:
        tokens = select_tokens(
            log_probs, MASK, given.get("old_log_probs"), BATCH["advantages"], BATCH["loss_weights"]
        )
        per_token = FUNCTIONS[loss.name](tokens, Clip(loss.low, loss.high, loss.dual))
        return over(ours(loss), per_token.loss)

    def formula(moving: Tensor, held: Tensor) -> float:
        lines = [
            policy(loss, lp, still, {name: rows(value)[number] for name, value in given.items()})
            for number, (lp, still) in enumerate(zip(rows(moving), rows(held), strict=True))
        ]
        return float(aggregate(loss, lines))

    agrees(made, formula, LOG_PROBS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KL_TYPES)
@pytest.mark.parametrize("weighed", [False, True], ids=["plain", "times-ratio"])
def test_kl_types(kind: str, mode: str, weighed: bool) -> None:
    """Value and gradient of every KL type in every mode, also times the ratio; k1+ and k3+ have the
    gradient of k2."""
    loss = Loss("ppo", mode=mode, scale=SCALE, kl_type=kind, kl_times_ratio=weighed)

    def made(log_probs: Tensor) -> Tensor:
        names = (log_probs, BATCH["ref_log_prob"], BATCH["old_log_probs"])
        kept, reference, old = (torch.where(MASK, values, 0.0) for values in names)
        return over(ours(loss), kl_terms(kept, reference, kind, old if weighed else None))

    def formula(moving: Tensor, held: Tensor) -> float:
        lines = enumerate(zip(rows(moving), rows(held), strict=True))
        return float(
            aggregate(
                loss,
                [weighted_divergence(loss, *pair, with_others(number)) for number, pair in lines],
            )
        )

    agrees(made, formula, LOG_PROBS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", CORRECTIONS)
@pytest.mark.parametrize("name", ["ppo", "reinforce", "cispo"])
def test_rollout_correction(name: str, kind: str, mode: str) -> None:
    """The policy term times w, w held fixed, the denominators as without it; both bounds are
    met."""
    settings = {"mode": kind, "lower": 0.8, "upper": 1.3}
    loss = Loss(name, mode=mode, scale=SCALE, correction=settings)
    pairs = zip(rows(BATCH["old_log_probs"]), rows(BATCH["rollout_log_probs"]), strict=True)
    weights = torch.cat([correction(*pair, **settings) for pair in pairs])  # type: ignore[arg-type]
    assert len({float(weight) for weight in weights}) >= 2

    def made(log_probs: Tensor) -> Tensor:
        tokens = select_tokens(log_probs, MASK, BATCH["old_log_probs"], BATCH["advantages"])
        rollout = torch.where(MASK, BATCH["rollout_log_probs"], 0.0)
        by = Correction(kind, 0.8, 1.3).weights(tokens.old, rollout, MASK)
        return over(ours(loss), FUNCTIONS[name](tokens, Clip()).loss * by)

    def formula(moving: Tensor, held: Tensor) -> float:
        lines = [
            policy(loss, lp, still, with_others(number))
            for number, (lp, still) in enumerate(zip(rows(moving), rows(held), strict=True))
        ]
        return float(aggregate(loss, lines))

    agrees(made, formula, LOG_PROBS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("old", [True, False], ids=["clipped", "plain"])
def test_value_loss(mode: str, old: bool) -> None:
    """0.5 max((v - ret)^2, (clip(v, old - eps, old + eps) - ret)^2), and 0.5 (v - ret)^2 without
    old values."""
    loss = Loss("ppo", mode=mode, scale=SCALE)

    def made(values: Tensor) -> Tensor:
        kept, returns, before = (
            torch.where(MASK, v, 0.0) for v in (values, BATCH["returns"], BATCH["values"])
        )
        return over(ours(loss), value_loss(kept, returns, before if old else None, 0.3)[0])

    def one(value: float, target: float, before: float) -> float:
        near = min(max(value, before - 0.3), before + 0.3)
        return 0.5 * (
            max((value - target) ** 2, (near - target) ** 2) if old else (value - target) ** 2
        )

    def formula(moving: Tensor, held: Tensor) -> float:
        lines = zip(rows(moving), rows(BATCH["returns"]), rows(BATCH["values"]), strict=True)
        worth = [[one(*map(float, token)) for token in zip(*line, strict=True)] for line in lines]
        return float(aggregate(loss, [torch.tensor(line, dtype=torch.float64) for line in worth]))

    agrees(made, formula, LOG_PROBS)


def test_aggregations_at_any_cut() -> None:
    """Numerators and counts of any two parts of the rows add up to those of the whole."""
    values: Any = torch.where(MASK, BATCH["advantages"], 0.0)
    for mode in MODES:
        found = Aggregation(mode, SCALE)
        for at in (1, 2, 3):
            parts = [(values[:at], MASK[:at]), (values[at:], MASK[at:])]
            total = sum(float(found.numerator(*part)) for part in parts)
            assert total == pytest.approx(float(found.numerator(values, MASK)), rel=1e-14)
            assert sum(int(found.count(part[1])) for part in parts) == int(found.count(MASK))
