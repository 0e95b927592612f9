"""From values per token to one number: numerators that add up over micro-batches and ranks, one
denominator, and weights for tokens whose sampler had other numbers than the trainer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nexrl_worker.training.errors import InvalidValue

MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass(frozen=True)
class Aggregation:
    """How a loss is summed over a mini-batch of N scored tokens in B' rows that have any.

    token-mean: sum / N; seq-mean-token-sum: sum / B'; seq-mean-token-mean: sum of row means / B';
    seq-mean-token-sum-norm: sum / (B' scale); sum: the sum itself (of the `linear` loss).
    """

    mode: str
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in (*MODES, "sum"):
            raise InvalidValue(
                f"unknown loss_agg_mode {self.mode!r}",
                expected=", ".join(MODES),
                actual=str(self.mode),
            )

    def numerator(self, values: Tensor, mask: Tensor) -> Tensor:
        """The part of these rows: values [n,R], bool mask [n,R]; what is masked never matters."""
        rows = torch.where(mask, values, 0.0).sum(dim=-1)
        if self.mode == "seq-mean-token-mean":
            rows = rows / mask.sum(dim=-1).clamp(min=1)
        elif self.mode == "seq-mean-token-sum-norm":
            rows = rows / self.scale
        return rows.sum()

    def count(self, mask: Tensor) -> Tensor:
        """What is counted for the denominator: rows that have a scored token, or scored tokens
        (0-dim, integer)."""
        return mask.any(dim=-1).sum() if self.mode.startswith("seq-") else mask.sum()

    def divisor(self, count: float) -> float:
        """The denominator of all rows together, from the sum of their counts; never 0."""
        return 1.0 if self.mode == "sum" else max(count, 1.0)


@dataclass(frozen=True)
class Correction:
    """w = exp(old - rollout) of a token, or for `sequence_*` its product over the row's scored
    tokens.

    `*_truncate` clips w to [lower, upper], `*_mask` makes it 0 outside them. Multiplies the policy
    term alone; the denominators stay. Yao et al., "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training", 2025 (truncation); Liu et al., "When Speed Kills Stability", 2025
    (masking).
    """

    mode: str
    lower: float
    upper: float

    def __post_init__(self) -> None:
        if self.mode not in CORRECTIONS:
            message = f"unknown rollout_correction.mode {self.mode!r}"
            raise InvalidValue(message, expected=", ".join(CORRECTIONS), actual=str(self.mode))

    @property
    def rejects(self) -> bool:
        """Whether there are tokens of no weight at all."""
        return self.mode.endswith("mask")

    def weights(self, old: Tensor, rollout: Tensor, mask: Tensor) -> Tensor:
        """w [n,R], without gradient; meaningless where the bool mask [n,R] is False."""
        weight = self._ratio(old, rollout, mask)
        if self.rejects:
            return torch.where(self._inside(weight), weight, 0.0)
        return weight.clamp(self.lower, self.upper)

    def kept(self, old: Tensor, rollout: Tensor, mask: Tensor) -> Tensor:
        """Those of the bool mask [n,R] whose w lies within the bounds."""
        return mask & self._inside(self._ratio(old, rollout, mask))

    def _ratio(self, old: Tensor, rollout: Tensor, mask: Tensor) -> Tensor:
        """exp(old - rollout) [n,R], or its product over a row; all shapes [n,R]."""
        gap = torch.where(mask, old - rollout, 0.0).detach()
        if self.mode.startswith("sequence"):
            gap = gap.sum(dim=-1, keepdim=True).expand_as(gap)
        return gap.exp()

    def _inside(self, weight: Tensor) -> Tensor:
        return (weight >= self.lower) & (weight <= self.upper)
