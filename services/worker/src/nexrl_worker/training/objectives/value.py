"""A critic's update towards returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nexrl_worker.training.batch.micro_batch import MicroBatch
from nexrl_worker.training.losses.aggregation import Aggregation
from nexrl_worker.training.losses.value import ValueLoss
from nexrl_worker.training.model.value_head import ValueModel
from nexrl_worker.training.model.wrapper import ModelWrapper
from nexrl_worker.training.objectives.base import Evaluated, count_batch
from nexrl_worker.training.objectives.metrics import MetricAccumulator, Totals

# Of a difference of two float64 means: what is smaller is no variance.
_ROUNDING = 1e-12


class ValueObjective:
    """Clipped around the batch's `values` where it has them."""

    prefix = "critic"

    def __init__(self, model: ValueModel, loss: ValueLoss, aggregation: Aggregation) -> None:
        self._model = model
        self.models: Sequence[ModelWrapper] = [model]
        self._loss = loss
        self.aggregation = aggregation

    def evaluate(self, micro: MicroBatch, accumulator: MetricAccumulator) -> Evaluated:
        """See Objective."""
        mask = micro.mask
        values = torch.where(mask, self._model.values(micro), 0.0)
        returns = torch.where(mask, micro.values["returns"], 0.0)
        old = micro.values.get("values")
        kept = None if old is None else torch.where(mask, old, 0.0)
        per_token, clipped = self._loss(values, returns, kept)
        loss = self.aggregation.numerator(per_token, mask)
        accumulator.add("loss", loss)
        accumulator.add("values", values.double().sum())
        accumulator.add("returns", returns.double().sum())
        accumulator.add("returns_squared", returns.double().square().sum())
        accumulator.add("error", (returns - values).double().sum())
        accumulator.add("error_squared", (returns - values).double().square().sum())
        accumulator.add("clipped", (mask & clipped).sum())
        count_batch(micro, self.aggregation, accumulator)
        return Evaluated(loss)

    def metrics(self, totals: Totals) -> dict[str, Any]:
        """See Objective; explained variance is 1 - Var(ret - v) / Var(ret), 0 where the returns do
        not vary."""

        def variance(of: str) -> float:
            return totals.share(f"{of}_squared", "tokens") - totals.share(of, "tokens") ** 2

        spread = variance("returns")
        varies = spread > _ROUNDING * totals.share("returns_squared", "tokens")
        return {
            "critic/vf_loss": totals.sums["loss"]
            / self.aggregation.divisor(totals.sums["denominator"]),
            "critic/vf_clipfrac": totals.share("clipped", "tokens"),
            "critic/values_mean": totals.share("values", "tokens"),
            "critic/returns_mean": totals.share("returns", "tokens"),
            "critic/explained_variance": 1.0 - variance("error") / spread if varies else 0.0,
        }

    def close(self) -> None:
        """See Objective."""
