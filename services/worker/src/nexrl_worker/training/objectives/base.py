"""What the trainer asks of an objective, and what its numbers are added up in."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from nexrl_worker.training.batch.micro_batch import MicroBatch
from nexrl_worker.training.losses.aggregation import Aggregation
from nexrl_worker.training.model.wrapper import ModelWrapper


@dataclass(frozen=True)
class Evaluated:
    """A micro-batch's unnormalised loss (0-dim), and what goes back to the client [n,R]."""

    loss: Tensor
    answers: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """A loss whose numerators add up over micro-batches and ranks; `prefix` names its metrics
    (actor, critic).

    `models`: those whose forwards `evaluate` runs, the trained one first.
    """

    prefix: str
    aggregation: Aggregation
    models: list[ModelWrapper]

    def evaluate(self, micro: MicroBatch, into: MetricAccumulator) -> Evaluated:
        """The loss of one micro-batch; adds its parts to `into`.

        Collective: all ranks evaluate equally often.
        """
        ...

    def metrics(self, totals: Totals) -> dict[str, Any]:
        """The numbers of one optimizer step, without `common_metrics`."""
        ...


@dataclass(frozen=True)
class Totals:
    """Sums by name, and values by name (sorted, on the CPU), of all micro-batches and ranks."""

    sums: dict[str, float]
    values: dict[str, Tensor]

    def share(self, name: str, of: str) -> float:
        """A sum over another one; 0 where there is nothing to divide by."""
        return self.sums[name] / max(self.sums[of], 1.0)

    def quantile(self, name: str, level: float) -> float:
        """The value (the nearest there is) below which a share `level` lies; NaN of none."""
        values = self.values[name]
        return float(values[round(level * (values.numel() - 1))]) if values.numel() else math.nan


class MetricAccumulator:
    """What the micro-batches of one optimizer step add up to: named float64 sums, and named values
    for quantiles. Every rank adds the same names, dummies included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._values: dict[str, list[Tensor]] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        """Add a 0-dim value; a number is filled in on the device: copying would wait for it."""
        if isinstance(value, Tensor):
            number = value.detach().double()
        else:
            number = torch.full((), value, dtype=torch.float64, device=self._device)
        self._sums[name] = self._sums[name] + number if name in self._sums else number

    def add_values(self, name: str, values: Tensor) -> None:
        """Keep values [any] for their quantiles."""
        self._values.setdefault(name, []).append(values.detach())

    def count(self, micro: MicroBatch, aggregation: Aggregation) -> None:
        """Add what `common_metrics` and the denominator need."""
        self.add("denominator", aggregation.count(micro.mask))
        self.add("tokens", micro.mask.sum())
        self.add("rows", micro.mask.any(dim=-1).sum())
        self.add("attended", micro.attended)
        self.add("padded", micro.padded)

    def reduce(self) -> Totals:
        """The sums and values of all ranks. Collective."""
        names = sorted(self._sums)
        stacked = torch.stack([self._sums[name] for name in names])
        dist.all_reduce(stacked)
        values = {
            name: _gathered(torch.cat(self._values[name])).sort().values.cpu()
            for name in sorted(self._values)
        }
        return Totals(dict(zip(names, stacked.tolist(), strict=True)), values)


def _gathered(mine: Tensor) -> Tensor:
    """Every rank's 1-dim tensor in one; lengths may differ. Collective."""
    world = dist.get_world_size()
    if world == 1:
        return mine
    sizes = [torch.zeros(1, dtype=torch.int64, device=mine.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([mine.numel()], device=mine.device))
    counts = [int(size) for size in sizes]
    padded = mine.new_zeros(max(counts))
    padded[: mine.numel()] = mine
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def common_metrics(objective: Objective, totals: Totals) -> dict[str, Any]:
    """Loss over its denominator, scored tokens and their rows, the share of padding computed."""
    prefix, sums = objective.prefix, totals.sums
    return {
        f"{prefix}/loss": sums["loss"] / objective.aggregation.divisor(sums["denominator"]),
        f"{prefix}/tokens": sums["tokens"],
        f"{prefix}/rows": sums["rows"],
        f"{prefix}/padding_share": 1.0 - totals.share("attended", "padded"),
    }
