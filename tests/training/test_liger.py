"""Our policy losses against those of liger-kernel: another library's code, in float64 on the CPU.

Where it means something else by a name: its CISPO bound is that of the ratio itself (our 1 + high),
it divides sums of rows by all rows and not by those with a scored token, its advantages are one per
row, and its sequence ratio carries the whole gradient where ours (GSPO-token) splits it over the
tokens; with one advantage per row that is the same.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction
from nexrl_worker.training.losses.aggregation import Aggregation, Correction
from nexrl_worker.training.losses.formulas import FUNCTIONS, Clip, kl_terms, select_tokens
from torch import Tensor

ROWS, WIDTH = 6, 9
# Our mode, and the loss_type that sums as it does; `dr_grpo` divides by rows times
# max_completion_length.
TYPES = {"token-mean": "bnpo", "seq-mean-token-mean": "grpo", "seq-mean-token-sum-norm": "dr_grpo"}


def batch() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(7)
    log_probs = -2 - torch.rand(ROWS, WIDTH, generator=random, dtype=torch.float64)
    mask = torch.rand(ROWS, WIDTH, generator=random) < 0.7
    mask[:, 2] = True

    def near(spread: float) -> Tensor:
        return log_probs + spread * torch.randn(ROWS, WIDTH, generator=random, dtype=torch.float64)

    return {
        "log_probs": log_probs,
        "mask": mask,
        "old": near(0.4),
        "reference": near(0.4),
        "rollout": near(0.4),
        "advantages": torch.randn(ROWS, generator=random, dtype=torch.float64),
    }


def theirs(data: dict[str, Tensor], **settings: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    leaf = data["log_probs"].clone().requires_grad_()
    loss, metrics = LigerFusedLinearGRPOFunction.ppo_loss_fn(
        leaf,
        data["mask"].double(),
        data["advantages"],
        data["mask"].double(),
        ref_per_token_logps=data["reference"],
        old_per_token_logps=data["old"],
        max_completion_length=WIDTH,
        **settings,
    )
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad, metrics


def ours(
    data: dict[str, Tensor],
    name: str,
    mode: str,
    clip: Clip,
    beta: float,
    by: Correction | None = None,
) -> tuple[Tensor, Tensor, float]:
    """The loss, its gradient, and the share of tokens that a clip held back."""
    leaf = data["log_probs"].clone().requires_grad_()
    mask = data["mask"]
    tokens = select_tokens(leaf, mask, data["old"], data["advantages"][:, None].expand(-1, WIDTH))
    made = FUNCTIONS[name](tokens, clip)
    weights = 1.0 if by is None else by.weights(tokens.old, data["rollout"], mask)
    aggregation = Aggregation(mode, WIDTH if mode.endswith("norm") else 1.0)
    terms = made.loss * weights + beta * kl_terms(
        tokens.log_probs, torch.where(mask, data["reference"], 0.0), "k3"
    )
    loss = aggregation.numerator(terms, mask) / aggregation.divisor(float(aggregation.count(mask)))
    loss.backward()
    low, high = made.clipped_low, made.clipped_high
    held = 0 if low is None or high is None else int((mask & (low | high)).sum())
    assert leaf.grad is not None
    return loss.detach(), leaf.grad, held / int(mask.sum())


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert torch.allclose(one[0], other[0], rtol=1e-12, atol=0)
    assert torch.allclose(one[1], other[1], rtol=1e-12, atol=1e-15)
    assert one[1].abs().max() > 1e-3


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("mode", TYPES)
@pytest.mark.parametrize("dual", [None, 1.6])
def test_ppo(dual: float | None, mode: str, beta: float) -> None:
    """Separate bounds, a dual clip (their `delta`, above 1 + high), k3 and clip fractions, in every
    mode they have.

    Below 1 + high `delta` bounds the ratio before the other clip, and so costs (1 + high) |A| where
    ours costs c |A|.
    """
    data = batch()
    found = ours(data, "ppo", mode, Clip(0.15, 0.3, dual), beta)
    wanted = theirs(
        data, epsilon_low=0.15, epsilon_high=0.3, delta=dual, beta=beta, loss_type=TYPES[mode]
    )
    same(found, wanted)
    assert found[2] == pytest.approx(float(wanted[2][-1])) and found[2] > 0.1
    dapo = theirs(data, epsilon_low=0.15, epsilon_high=0.3, delta=dual, beta=beta, loss_type="dapo")
    assert mode != "token-mean" or torch.allclose(
        found[1], dapo[1], rtol=1e-6
    )  # its divisor is a float32


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("bounds", [(3e-4, 4e-4), (0.05, 0.06)])
def test_gspo(bounds: tuple[float, float], beta: float) -> None:
    """One ratio per row from the mean of its scored tokens."""
    data = batch()
    found = ours(data, "gspo", "seq-mean-token-mean", Clip(*bounds), beta)
    settings = {
        "epsilon_low": bounds[0],
        "epsilon_high": bounds[1],
        "beta": beta,
        "loss_type": "grpo",
    }
    wanted = theirs(data, importance_sampling_level="sequence", **settings)
    same(found, wanted)
    assert found[2] == pytest.approx(float(wanted[2][-1])) and 0 < found[2] < 1


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_cispo(beta: float) -> None:
    """Weights bounded above alone; to 1e-6, as their divisor is a float32."""
    data = batch()
    found = ours(data, "cispo", "token-mean", Clip(None, 0.2), beta)
    wanted = theirs(data, epsilon_high=1.2, beta=beta, loss_type="cispo")
    assert torch.allclose(found[0], wanted[0], rtol=1e-6) and torch.allclose(
        found[1], wanted[1], rtol=1e-6
    )
    assert found[1].abs().max() > 1e-3


def test_importance_sampling() -> None:
    """PPO without bounds."""
    data = batch()
    found = ours(data, "importance_sampling", "token-mean", Clip(), 0.0)
    same(found, theirs(data, epsilon_low=1e9, epsilon_high=1e9, beta=0.0, loss_type="bnpo"))


@pytest.mark.parametrize("mode", TYPES)
def test_rollout_correction(mode: str) -> None:
    """Truncated weights on the policy term alone, the KL term untouched: their `vllm_is_ratio`."""
    data = batch()
    found = ours(data, "ppo", mode, Clip(), 0.3, Correction("token_truncate", 0.0, 1.5))
    ratio = torch.exp(data["old"] - data["rollout"]).clamp(max=1.5)
    assert (ratio == 1.5).any()
    same(found, theirs(data, beta=0.3, vllm_is_ratio=ratio, loss_type=TYPES[mode]))
