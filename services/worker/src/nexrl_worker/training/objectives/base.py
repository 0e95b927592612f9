"""What the trainer asks of an objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from nexrl_worker.training.batch.micro_batch import MicroBatch
from nexrl_worker.training.losses.aggregation import Aggregation
from nexrl_worker.training.model.wrapper import ModelWrapper
from nexrl_worker.training.objectives.metrics import MetricAccumulator, Totals


@dataclass(frozen=True)
class Evaluated:
    """The unnormalised loss of a micro-batch (0-dim, to run backward on), and what goes back to the
    client [n,R]."""

    loss: Tensor
    answers: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """A loss whose numerators add up over micro-batches and ranks; `prefix` names its metrics
    (actor, critic).

    `models`: the models whose forwards `evaluate` runs, the trained one first.
    """

    prefix: str
    aggregation: Aggregation
    models: Sequence[ModelWrapper]

    def evaluate(self, micro: MicroBatch, accumulator: MetricAccumulator) -> Evaluated:
        """The loss of one micro-batch; adds its parts to `accumulator`.

        Collective: all ranks evaluate equally often.
        """
        ...

    def metrics(self, totals: Totals) -> dict[str, Any]:
        """The numbers of one optimizer step, without those that every objective has (see
        `common_metrics`)."""
        ...

    def close(self) -> None:
        """Free what was gathered for evaluating."""
        ...


def count_batch(
    micro: MicroBatch, aggregation: Aggregation, accumulator: MetricAccumulator
) -> None:
    """Add what `common_metrics` and the denominator need."""
    accumulator.add("denominator", aggregation.count(micro.mask))
    accumulator.add("tokens", micro.mask.sum())
    accumulator.add("rows", micro.mask.any(dim=-1).sum())
    accumulator.add("attended", micro.attended)
    accumulator.add("padded", micro.padded)


def common_metrics(objective: Objective, totals: Totals) -> dict[str, Any]:
    """Loss over its denominator, scored tokens and their rows, and the share of computed columns
    that was padding."""
    prefix, sums = objective.prefix, totals.sums
    return {
        f"{prefix}/loss": sums["loss"] / objective.aggregation.divisor(sums["denominator"]),
        f"{prefix}/tokens": sums["tokens"],
        f"{prefix}/rows": sums["rows"],
        f"{prefix}/padding_share": 1.0 - totals.share("attended", "padded"),
    }
