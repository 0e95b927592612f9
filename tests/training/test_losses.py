"""The losses as formulas, one after the other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from nexrl_worker.training import InvalidValue
from nexrl_worker.training.losses.aggregation import Aggregation
from nexrl_worker.training.losses.divergence import kl_terms
from nexrl_worker.training.losses.policy import LOSSES, Clip, policy_loss, select_tokens
from torch import Tensor


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
    assert LOSSES["ppo"].function(made, Clip(0.1, 0.3)).loss.tolist()[0] == pytest.approx(wanted)
    wanted[4] = 2.8  # the dual clip bounds what a negative advantage can cost
    assert LOSSES["ppo"].function(made, Clip(0.1, 0.3, dual=1.4)).loss.tolist()[0] == pytest.approx(wanted)


def test_other_losses_by_hand() -> None:
    """importance_sampling -rA, reinforce -A lp, cross_entropy -lp."""
    _, made = tokens([-1.0, -2.0], [-1.5, -1.0], [3.0, -4.0])
    assert LOSSES["importance_sampling"].function(made, Clip()).loss.tolist()[0] == pytest.approx(
        [-3 * math.e**0.5, 4 / math.e]
    )
    assert LOSSES["reinforce"].function(made, Clip()).loss.tolist()[0] == pytest.approx([3.0, -8.0])
    assert LOSSES["cross_entropy"].function(made, Clip()).loss.tolist()[0] == pytest.approx([1.0, 2.0])


@pytest.mark.parametrize("name", sorted({*LOSSES} - {"gspo", "cispo"}))
def test_gradients_are_finite_differences(name: str) -> None:
    """Every loss's gradient is its slope, with old and the advantage held fixed."""
    lp, _ = tokens([-1.0, -1.2, -0.4], None, [0.0] * 3)

    def total(log_probs: Tensor) -> Tensor:
        old, gains = torch.tensor([[-1.4, -1.1, -0.9]]).double(), torch.tensor([[1.0, -2.0, 0.5]]).double()
        made = select_tokens(log_probs, torch.ones(1, 3).bool(), old, gains, gains)
        return policy_loss(name).function(made, Clip(0.2, 0.2)).loss.sum()

    assert torch.autograd.gradcheck(total, (lp,))


def test_masked_values_never_matter() -> None:
    """NaN and infinity under the mask change neither loss nor gradient."""
    lp = torch.tensor([[-1.0, -float("inf"), float("nan")]], dtype=torch.float64, requires_grad=True)
    bad = torch.tensor([[-1.0, float("nan"), float("inf")]], dtype=torch.float64)
    made = select_tokens(lp, torch.tensor([[True, False, False]]), bad, bad)
    loss = Aggregation("token-mean").numerator(LOSSES["ppo"].function(made, Clip()).loss, made.mask)
    loss.backward()
    assert loss.item() == 1.0 and lp.grad is not None and lp.grad.tolist() == [[1.0, 0.0, 0.0]]


def test_unknown_names_are_refused() -> None:
    """A loss, a mode and a KL type that nobody knows are refused with the known ones."""
    value = torch.zeros(1, 1)
    for call in (
        lambda: policy_loss("dpo"),
        lambda: Aggregation("mean"),
        lambda: kl_terms(value, value, "k9"),
    ):
        with pytest.raises(InvalidValue) as caught:
            call()
        assert caught.value.expected


def test_aggregation_by_hand() -> None:
    """Two rows of 3 and 1 scored tokens and one of none: three modes, three results."""
    values = torch.tensor([[1.0, 2.0, 6.0], [10.0, float("nan"), 0.0], [7.0, 7.0, 7.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    wanted = {"token-mean": 19 / 4, "seq-mean-token-sum": 19 / 2, "seq-mean-token-mean": 13 / 2}
    for mode, value in wanted.items():
        found = Aggregation(mode)
        assert found.numerator(values, mask).item() / found.divisor(float(found.count(mask))) == pytest.approx(value)


def test_kl_types_by_formula() -> None:
    """k1 = d, abs = |d|, k2 = d^2/2, k3 = exp(-d) - 1 + d, under both their names."""
    d = np.array([-0.7, 0.0, 1.3])
    wanted = {"k1": d, "abs": abs(d), "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d}
    wanted |= {"kl": wanted["k1"], "mse": wanted["k2"], "low_var_kl": wanted["k3"]}
    for kind, value in wanted.items():
        assert kl_terms(torch.from_numpy(d), torch.zeros(3).double(), kind).tolist() == pytest.approx(value.tolist())
