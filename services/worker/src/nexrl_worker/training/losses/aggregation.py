"""From values per token to one number: numerators that add up over micro-batches and ranks, and one
denominator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nexrl_worker.training.errors import InvalidValue

MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


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
