"""What the micro-batches of one optimizer step add up to, over all ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Totals:
    """Sums by name, and pooled values by name (sorted, on the CPU), of all micro-batches and
    ranks."""

    sums: dict[str, float]
    pools: dict[str, Tensor]

    def share(self, name: str, of: str) -> float:
        """A sum over another one; 0 where there is nothing to divide by."""
        return self.sums[name] / max(self.sums[of], 1.0)

    def quantile(self, name: str, level: float) -> float:
        """The pooled value below which a share `level` of them lies (the nearest one there is); NaN
        of none."""
        values = self.pools[name]
        return float(values[round(level * (values.numel() - 1))]) if values.numel() else math.nan


class MetricAccumulator:
    """Named float64 sums, and named pools of values. Every rank adds the same names, dummies
    included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._pools: dict[str, list[Tensor]] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        """Add a 0-dim value; a number is filled in on the device, as copying it there would wait
        for the device."""
        if isinstance(value, Tensor):
            number = value.detach().double()
        else:
            number = torch.full((), value, dtype=torch.float64, device=self._device)
        self._sums[name] = self._sums[name] + number if name in self._sums else number

    def add_values(self, name: str, values: Tensor) -> None:
        """Keep values [any] for their quantiles."""
        self._pools.setdefault(name, []).append(values.detach())

    def reduce(self) -> Totals:
        """The sums and pools of all ranks. Collective."""
        names = sorted(self._sums)
        stacked = torch.stack([self._sums[name] for name in names])
        dist.all_reduce(stacked)
        pools = {
            name: _gathered(torch.cat(self._pools[name])).sort().values.cpu()
            for name in sorted(self._pools)
        }
        return Totals(dict(zip(names, stacked.tolist(), strict=True)), pools)


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
