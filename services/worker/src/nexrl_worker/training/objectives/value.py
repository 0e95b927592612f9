"""A critic's update towards returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from nexrl_worker.training.batch.micro_batch import MicroBatch
from nexrl_worker.training.losses.formulas import value_loss
from nexrl_worker.training.model.policy import PolicyModel
from nexrl_worker.training.model.value_head import ValueModel
from nexrl_worker.training.model.wrapper import ModelWrapper
from nexrl_worker.training.objectives.base import Evaluated, MetricAccumulator, Totals
from nexrl_worker.training.prepare import LossSettings

# Of a difference of two float64 means: what is smaller is no variance.
_ROUNDING = 1e-12


class ValueObjective:
    """Clipped around the batch's `values` where it has them."""

    prefix = "critic"

    def __init__(
        self,
        model: ModelWrapper,
        settings: LossSettings,
        names: tuple[str, ...],
        frozen: Callable[[], PolicyModel],
    ) -> None:
        self._model = cast(ValueModel, model)
        self._clip = settings.value_clip
        self.models: list[ModelWrapper] = [model]
        self.aggregation = settings.aggregation

    def evaluate(self, micro: MicroBatch, into: MetricAccumulator) -> Evaluated:
        """See Objective."""
        mask = micro.mask
        values = torch.where(mask, self._model.values(micro), 0.0)
        returns = torch.where(mask, micro.values["returns"], 0.0)
        old = micro.values.get("values")
        kept = None if old is None else torch.where(mask, old, 0.0)
        per_token, clipped = value_loss(values, returns, kept, self._clip)
        loss = self.aggregation.numerator(per_token, mask)
        into.add("loss", loss)
        into.add("values", values.double().sum())
        into.add("returns", returns.double().sum())
        into.add("returns_squared", returns.double().square().sum())
        into.add("error", (returns - values).double().sum())
        into.add("error_squared", (returns - values).double().square().sum())
        into.add("clipped", (mask & clipped).sum())
        into.count(micro, self.aggregation)
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
