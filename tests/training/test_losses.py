"""The losses as formulas, one after the other."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from nexrl_contract.losses import LOSSES
from nexrl_worker.training import InvalidValue
from nexrl_worker.training.losses.aggregation import Aggregation, Correction
from nexrl_worker.training.losses.formulas import FUNCTIONS, Clip, kl_terms, select_tokens


def tokens(log_probs: list[float], old: list[float] | None, gains: list[float]) -> Any:
    lp = torch.tensor([log_probs], dtype=torch.float64, requires_grad=True)
    before = None if old is None else torch.tensor([old], dtype=torch.float64)
    return lp, select_tokens(
        lp, torch.ones(1, len(log_probs)).bool(), before, torch.tensor([gains], dtype=torch.float64)
    )


def test_ppo_by_hand() -> None:
    """Six tokens: inside, above and below the bounds, for either sign of the advantage."""
    ratios, gains = [1.1, 1.5, 0.5, 1.1, 1.5, 0.5], [2.0, 2.0, 2.0, -2.0, -2.0, -2.0]
    _, made = tokens([math.log(r) for r in ratios], [0.0] * 6, gains)
    wanted = [-2.2, -2.6, -1.0, 2.2, 3.0, 1.8]
    assert FUNCTIONS["ppo"](made, Clip(0.1, 0.3)).loss.tolist()[0] == pytest.approx(wanted)
    wanted[4] = 2.8  # the dual clip bounds what a negative advantage can cost
    assert FUNCTIONS["ppo"](made, Clip(0.1, 0.3, dual=1.4)).loss.tolist()[0] == pytest.approx(
        wanted
    )


def test_other_losses_by_hand() -> None:
    """importance_sampling -rA, reinforce -A lp, cross_entropy -lp."""
    _, made = tokens([-1.0, -2.0], [-1.5, -1.0], [3.0, -4.0])
    assert FUNCTIONS["importance_sampling"](made, Clip()).loss.tolist()[0] == pytest.approx(
        [-3 * math.e**0.5, 4 / math.e]
    )
    assert FUNCTIONS["reinforce"](made, Clip()).loss.tolist()[0] == pytest.approx([3.0, -8.0])
    assert FUNCTIONS["cross_entropy"](made, Clip()).loss.tolist()[0] == pytest.approx([1.0, 2.0])


def test_gspo_by_hand() -> None:
    """s = exp(mean(lp - old)) of the row: 3e-4 and 4e-4 around 1, the worth of -sA, the gradient
    -sA of every token."""
    for shift, gain, slope in (
        (3.9e-4, 2.0, True),
        (4.1e-4, 2.0, False),
        (-2.9e-4, -2.0, True),
        (-3.1e-4, -2.0, False),
    ):
        gaps = [0.5 + shift, -1.5 + shift, 1.0 + shift]
        lp, made = tokens([-1.0 + gap for gap in gaps], [-1.0] * 3, [gain] * 3)
        bounds = LOSSES["gspo"].clip
        assert bounds == (3e-4, 4e-4)
        found = FUNCTIONS["gspo"](made, Clip(*bounds))
        s = math.exp(shift)
        assert found.loss.tolist()[0] == pytest.approx(
            [-gain * min(max(s, 1 - 3e-4), 1 + 4e-4)] * 3, rel=1e-14
        )
        found.loss.sum().backward()
        assert lp.grad.tolist()[0] == pytest.approx([-gain * s if slope else 0.0] * 3, rel=1e-12)


def test_cispo_by_hand() -> None:
    """-w A lp with w = min(r, 1.2): every token keeps its gradient, and a lower bound is there only
    where it is set."""
    ratios, gains = [0.5, 1.1, 1.5], [2.0, -1.0, 3.0]
    for low, least in ((None, 0.5), (0.2, 0.8)):
        lp, made = tokens([math.log(r) - 1 for r in ratios], [-1.0] * 3, gains)
        found = FUNCTIONS["cispo"](made, Clip(low, 0.2))
        weights = [least, 1.1, 1.2]
        logs = [math.log(r) - 1 for r in ratios]
        assert found.loss.tolist()[0] == pytest.approx(
            [-w * a * x for w, a, x in zip(weights, gains, logs, strict=True)]
        )
        found.loss.sum().backward()
        assert lp.grad.tolist()[0] == pytest.approx(
            [-w * a for w, a in zip(weights, gains, strict=True)]
        )


def test_correction_by_hand() -> None:
    """Ratios 0.5, 1.5 and 4, whose product is 3, between bounds of 0.8 and 2: clipped, dropped, and
    both by the row."""
    old, mask = (
        torch.tensor([[0.5, 1.5, 4.0, float("nan")]]).double().log(),
        torch.tensor([[True, True, True, False]]),
    )
    wanted = {
        "token_truncate": [0.8, 1.5, 2.0],
        "token_mask": [0.0, 1.5, 0.0],
        "sequence_truncate": [2.0] * 3,
        "sequence_mask": [0.0] * 3,
    }
    for mode, weights in wanted.items():
        found = Correction(mode, 0.8, 2.0).weights(old, torch.zeros(1, 4).double(), mask)
        assert found.tolist()[0][:3] == pytest.approx(weights)


@pytest.mark.parametrize(
    ("name", "gain", "clip", "loss"),
    [
        ("ppo", 2.0, Clip(0.2, 0.2), -2.4),
        ("ppo", 0.0, Clip(0.2, 0.2), 0.0),
        ("ppo", -2.0, Clip(0.2, 0.2, dual=3.0), 6.0),
        ("gspo", 2.0, Clip(3e-4, 4e-4), -2.0008),
        ("cispo", 0.0, Clip(None, 0.2), 0.0),
        ("importance_sampling", 0.0, Clip(), 0.0),
    ],
)
def test_a_ratio_beyond_float32_costs_what_its_clipped_loss_says(
    name: str, gain: float, clip: Clip, loss: float
) -> None:
    """exp(200) is inf in float32: where the formula bounds the loss it stays finite, its gradient
    is 0, the ratio told."""
    lp = torch.tensor([[-1.0]], requires_grad=True)
    made = select_tokens(
        lp, torch.ones(1, 1).bool(), torch.tensor([[-201.0]]), torch.tensor([[gain]])
    )
    found = FUNCTIONS[name](made, clip)
    found.loss.sum().backward()
    assert (
        found.loss.item() == pytest.approx(loss) and lp.grad is not None and lp.grad.item() == 0.0
    )
    assert found.ratio is not None and found.ratio.item() == math.inf


def test_a_ratio_beyond_float32_is_not_hidden_where_it_counts() -> None:
    """A < 0 without a dual clip: the formula's loss is beyond float32 too, and the step is refused
    for it."""
    _, made = tokens([-1.0], [-201.0], [-1.0])
    made = replace(
        made, **{f.name: getattr(made, f.name).float() for f in fields(made) if f.name != "mask"}
    )
    assert FUNCTIONS["ppo"](made, Clip()).loss.item() == math.inf


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_masked_values_never_matter(name: str) -> None:
    """NaN and infinity under the mask change neither loss nor gradient, in every loss."""
    junk, infinite = float("nan"), float("inf")
    mask = torch.tensor([[True, False, True, False]])
    found = []
    for under in ([0.0, 0.0], [junk, infinite], [-infinite, junk], [1e308, -1e308]):
        lp = torch.tensor(
            [[-1.0, under[0], -2.0, under[1]]], dtype=torch.float64, requires_grad=True
        )
        more = [
            torch.tensor([[x, under[1], y, under[0]]]).double()
            for x, y in ((-1.5, -1.9), (2.0, -1.5), (0.5, 3.0))
        ]
        made = select_tokens(lp, mask, *more)
        loss = Aggregation("token-mean").numerator(FUNCTIONS[name](made, Clip()).loss, mask)
        loss.backward()
        assert lp.grad is not None
        found.append((loss.item(), lp.grad.tolist()))
    assert found[0][0] != 0.0 and found == [found[0]] * 4


def test_unknown_names_are_refused() -> None:
    """A mode and a KL type that nobody knows are refused with the known ones."""
    value = torch.zeros(1, 1)
    for call in (
        lambda: Aggregation("mean"),
        lambda: kl_terms(value, value, "k9"),
        lambda: Correction("mask", 0.0, 2.0),
    ):
        with pytest.raises(InvalidValue) as caught:
            call()
        assert caught.value.expected


def test_aggregation_by_hand() -> None:
    """Two rows of 3 and 1 scored tokens and one of none: four modes, four results."""
    values = torch.tensor([[1.0, 2.0, 6.0], [10.0, float("nan"), 0.0], [7.0, 7.0, 7.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    wanted = {"token-mean": 19 / 4, "seq-mean-token-sum": 19 / 2, "seq-mean-token-mean": 13 / 2}
    wanted["seq-mean-token-sum-norm"] = 19 / (2 * 8)
    for mode, value in wanted.items():
        found = Aggregation(mode, 8.0)
        assert found.numerator(values, mask).item() / found.divisor(
            float(found.count(mask))
        ) == pytest.approx(value)


def test_kl_types_by_formula() -> None:
    """k1 = d, abs = |d|, k2 = d^2/2, k3 = exp(-d) - 1 + d, under both their names; k1+ and k3+ have
    their values."""
    d = np.array([-0.7, 0.0, 1.3])
    wanted = {"k1": d, "abs": abs(d), "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d}
    wanted |= {
        "k1+": wanted["k1"],
        "k3+": wanted["k3"],
        "kl": wanted["k1"],
        "mse": wanted["k2"],
        "low_var_kl": wanted["k3"],
    }
    for kind, value in wanted.items():
        assert kl_terms(
            torch.from_numpy(d), torch.zeros(3).double(), kind
        ).tolist() == pytest.approx(value.tolist())
