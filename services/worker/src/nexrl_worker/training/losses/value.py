"""The critic's loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ValueLoss:
    """0.5 max((v - ret)^2, (clip(v, old - eps, old + eps) - ret)^2); without old values 0.5 (v -
    ret)^2.

    Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
    2016; the clip is that of OpenAI's PPO (Engstrom et al., "Implementation Matters in Deep Policy
    Gradients", 2020).
    """

    eps: float

    def __call__(
        self, values: Tensor, returns: Tensor, old: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The loss per token, and where the clipped branch won (bool); all shapes [n,R]."""
        plain = (values - returns).square()
        if old is None:
            return 0.5 * plain, torch.zeros_like(plain, dtype=torch.bool)
        clipped = (torch.clamp(values, old - self.eps, old + self.eps) - returns).square()
        return 0.5 * torch.maximum(plain, clipped), clipped > plain
