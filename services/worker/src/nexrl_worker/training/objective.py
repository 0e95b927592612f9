"""The loss of one micro-batch as sums that add up, and the metrics made of those sums."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nexrl_worker.training.aggregate import aggregate, denominator, kl_terms
from nexrl_worker.training.batch import MicroBatch
from nexrl_worker.training.losses import Tokens, select_tokens
from nexrl_worker.training.spec import LossSpec


class Sums:
    """Named float64 sums on the device; `reduce` adds them over all ranks in one collective."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._values: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor | int) -> None:
        number = torch.as_tensor(value, device=self._device).detach().double()
        self._values[name] = self._values[name] + number if name in self._values else number

    def reduce(self) -> dict[str, float]:
        """The sums over all ranks. Collective; every rank has the same names, dummies included."""
        names = sorted(self._values)
        stacked = torch.stack([self._values[name] for name in names])
        dist.all_reduce(stacked)
        return dict(zip(names, stacked.tolist(), strict=True))


def loss_sum(
    log_probs: Tensor, entropies: Tensor, reference: Tensor | None, micro: MicroBatch, spec: LossSpec, sums: Sums
) -> Tensor:
    """The unnormalised loss of a micro-batch (a scalar to run backward on); adds its parts to `sums`.

    Shapes: log_probs, entropies, reference [n,R].
    """
    mask, values = micro.mask, micro.values
    advantages = values.get("advantages")
    if spec.distillation_coeff is not None:
        gap = spec.distillation_coeff * (values["teacher_log_probs"] - log_probs.detach())
        advantages = gap if advantages is None else advantages + gap
    tokens = select_tokens(log_probs, values.get("old_log_probs"), advantages, mask)
    policy = aggregate(spec.loss.function(tokens, spec.clip), mask, spec.mode)
    entropy = aggregate(entropies, mask, spec.mode)
    loss = policy - spec.entropy_coeff * entropy if spec.entropy_coeff != 0.0 else policy
    sums.add("policy", policy)
    sums.add("entropy", entropy)
    if reference is not None:
        kept = torch.where(mask, reference, 0.0)
        divergence = aggregate(kl_terms(tokens.log_probs, kept, spec.kl_type), mask, spec.mode)
        loss = loss + spec.kl_coeff * divergence
        sums.add("kl", divergence)
    sums.add("loss", loss)
    _count(tokens, micro, spec, sums)
    return loss


@torch.no_grad()
def _count(tokens: Tokens, micro: MicroBatch, spec: LossSpec, sums: Sums) -> None:
    mask = micro.mask
    sums.add("denominator", denominator(mask, spec.mode))
    sums.add("tokens", mask.sum())
    sums.add("rows", mask.any(dim=-1).sum())
    sums.add("attended", micro.attended)
    sums.add("padded", micro.padded)
    if spec.loss.needs_old:
        ratio, gain = tokens.ratio, tokens.advantages
        sums.add("ratio", torch.where(mask, ratio, 0.0).sum())
        sums.add("approximate_kl", (tokens.old - tokens.log_probs).sum())
        sums.add("clipped_low", (mask & (gain < 0) & (ratio < 1.0 - spec.clip.low)).sum())
        sums.add("clipped_high", (mask & (gain > 0) & (ratio > 1.0 + spec.clip.high)).sum())


def metrics_of(sums: dict[str, float], spec: LossSpec) -> dict[str, float]:
    """Means over all ranks and micro-batches: sum of numerators over sum of denominators, 0 where nothing counts.

    `actor/pg_clipfrac*` are the shares of scored tokens whose gradient the clip removes (low: A < 0 and the ratio
    below its bound; high: A > 0 and above). `actor/padding_share` is of the columns computed.
    """
    whole, tokens = max(sums["denominator"], 1.0), max(sums["tokens"], 1.0)
    metrics = {
        "actor/loss": sums["loss"] / whole,
        "actor/pg_loss": sums["policy"] / whole,
        "actor/entropy_loss": sums["entropy"] / whole,
        "actor/tokens": sums["tokens"],
        "actor/rows": sums["rows"],
        "actor/padding_share": 1.0 - sums["attended"] / max(sums["padded"], 1.0),
    }
    if "kl" in sums:
        metrics["actor/kl_loss"] = sums["kl"] / whole
        metrics["actor/kl_loss_coef"] = spec.kl_coeff
    if "ratio" in sums:
        metrics["actor/ratio_mean"] = sums["ratio"] / tokens
        metrics["actor/ppo_kl"] = sums["approximate_kl"] / tokens
        metrics["actor/pg_clipfrac_low"] = sums["clipped_low"] / tokens
        metrics["actor/pg_clipfrac_high"] = sums["clipped_high"] / tokens
        metrics["actor/pg_clipfrac"] = (sums["clipped_low"] + sums["clipped_high"]) / tokens
    return metrics
