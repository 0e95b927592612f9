"""Rollout correction: weights for tokens whose sampler had other numbers than the trainer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nexrl_worker.training.errors import InvalidValue

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


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
        if self.mode not in MODES:
            message = f"unknown rollout_correction.mode {self.mode!r}"
            raise InvalidValue(message, expected=", ".join(MODES), actual=str(self.mode))

    @property
    def rejects(self) -> bool:
        """Whether there are tokens of no weight at all."""
        return self.mode.endswith("mask")

    def weights(self, old: Tensor, rollout: Tensor, mask: Tensor) -> Tensor:
        """w [n,R], without gradient; what stands where the bool mask [n,R] is False has no
        meaning."""
        weight = self._ratio(old, rollout, mask)
        if self.rejects:
            return torch.where(self._inside(weight), weight, 0.0)
        return weight.clamp(self.lower, self.upper)

    def kept(self, old: Tensor, rollout: Tensor, mask: Tensor) -> Tensor:
        """Those of the bool mask [n,R] whose w lies within the bounds."""
        return mask & self._inside(self._ratio(old, rollout, mask))

    def _ratio(self, old: Tensor, rollout: Tensor, mask: Tensor) -> Tensor:
        gap = torch.where(mask, old - rollout, 0.0).detach()
        if self.mode.startswith("sequence"):
            gap = gap.sum(dim=-1, keepdim=True).expand_as(gap)
        return gap.exp()

    def _inside(self, weight: Tensor) -> Tensor:
        return (weight >= self.lower) & (weight <= self.upper)
