"""From values per token to one number: numerators that add up over micro-batches and ranks, and their denominators."""

from __future__ import annotations

import torch
from torch import Tensor

from nexrl_worker.training.errors import InvalidValue

MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")


def aggregate(values: Tensor, mask: Tensor, mode: str) -> Tensor:
    """The numerator of `mode` for values [n,R] under the bool mask [n,R]; masked values never matter.

    token-mean and seq-mean-token-sum: the sum over scored tokens; seq-mean-token-mean: the sum of row means.
    """
    rows = torch.where(mask, values, 0.0).sum(dim=-1)
    if mode == "seq-mean-token-mean":
        rows = rows / mask.sum(dim=-1).clamp(min=1)
    elif mode not in MODES:
        raise InvalidValue(f"unknown loss_agg_mode {mode!r}", expected=", ".join(MODES), actual=mode)
    return rows.sum()


def denominator(mask: Tensor, mode: str) -> Tensor:
    """What the summed numerators are divided by: scored tokens N, or B' = rows that have any (bool mask [n,R])."""
    return mask.sum() if mode == "token-mean" else mask.any(dim=-1).sum()


def kl_terms(log_probs: Tensor, reference: Tensor, kind: str) -> Tensor:
    """Per-token estimates of KL(policy || reference), d = lp - ref (Schulman, "Approximating KL divergence", 2020).

    k1 (kl): d, whose gradient has zero mean; abs: |d|; k2 (mse): d^2/2, whose gradient is that of KL(policy||ref);
    k3 (low_var_kl): exp(-d) - 1 + d, whose gradient is that of KL(ref||policy).
    """
    difference = log_probs - reference
    if kind in ("k1", "kl"):
        return difference
    if kind == "abs":
        return difference.abs()
    if kind in ("k2", "mse"):
        return 0.5 * difference.square()
    if kind in ("k3", "low_var_kl"):
        return torch.expm1(-difference) + difference
    raise InvalidValue(f"unknown kl_loss_type {kind!r}", expected="k1, abs, k2, mse, k3, low_var_kl", actual=kind)
