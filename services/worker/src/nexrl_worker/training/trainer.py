"""Gradients and optimizer steps of one rank: accumulate, step, and both together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from nexrl_worker.training.aggregate import denominator
from nexrl_worker.training.batch import BatchReader, Rows
from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.objective import Sums, loss_sum, metrics_of
from nexrl_worker.training.optim import Optimizer, Schedule
from nexrl_worker.training.parallelize import release
from nexrl_worker.training.plan import MiniBatch, Plan
from nexrl_worker.training.scorer import Scorer
from nexrl_worker.training.spec import LossSpec


class Trainer:
    """The optimizer of a sharded model and the gradients that await a step.

    `frozen` gives the reference model, asked for only when a KL term has no `ref_log_prob`.
    """

    def __init__(self, scorer: Scorer, actor: Any, device: torch.device, frozen: Callable[[], Scorer]) -> None:
        self._scorer = scorer
        self._device = device
        self._frozen = frozen
        self._grad_clip = actor.grad_clip
        self._schedule = Schedule(actor.optim)
        self.optimizer = Optimizer(scorer.hf, actor.optim)
        self.steps = 0
        # Aggregation of the pending gradients, and what they must still be divided by (0: nothing was scored).
        self._pending: tuple[str, float] | None = None

    @property
    def pending(self) -> bool:
        """True while gradients of `accumulate` await `step`."""
        return self._pending is not None

    def check(self, plan: Plan, rows: Rows, spec: LossSpec, accumulates: bool) -> None:
        """Raise InvalidValue if this operation cannot follow the last one, or lacks old_log_probs. Local."""
        if self._pending is not None and not accumulates:
            raise InvalidValue("gradients are pending: call optim_step, or optim_step(discard=True), first")
        if self._pending is not None and self._pending[0] != spec.mode:
            message = f"pending gradients were accumulated with {self._pending[0]}, not {spec.mode}"
            raise InvalidValue(message, expected=self._pending[0], actual=spec.mode)
        if spec.loss.needs_old and not rows.has("old_log_probs") and len(plan.mini_batches) > 1:
            message = f"{len(plan.mini_batches)} optimizer steps on one batch need old_log_probs"
            raise InvalidValue(message, tensor="old_log_probs", expected="[B,S] or [B,R]", actual="missing")

    def accumulate(self, plan: Plan, reader: BatchReader, spec: LossSpec) -> dict[str, Any]:
        """Add the batch's unnormalised loss gradients to those pending; metrics over all ranks. Collective."""
        metrics = self._backward(plan.mini_batches[0], reader, spec, 1.0)
        before = 0.0 if self._pending is None else self._pending[1]
        self._pending = (spec.mode, before + metrics.pop("denominator"))
        return metrics

    def step(self, lr: float | None = None, grad_clip: float | None = None, discard: bool = False) -> dict[str, Any]:
        """Divide the pending gradients by their count, clip, step; `skipped` says why not. Collective."""
        count = 0.0 if self._pending is None else self._pending[1]
        self._pending = None
        if discard or count == 0.0:
            self.optimizer.discard()
            return {"step_applied": False, "skipped": "discarded" if discard else "nothing_to_learn"}
        rate = self._schedule.lr(self.steps) if lr is None else lr
        norm = self.optimizer.grad_norm() / count
        metrics: dict[str, Any] = {"actor/grad_norm": norm, "actor/lr": rate}
        if not math.isfinite(norm):
            self.optimizer.discard()
            return {**metrics, "step_applied": False, "skipped": "non_finite_gradient"}
        limit = self._grad_clip if grad_clip is None else grad_clip
        shrink = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
        self.optimizer.step(shrink / count, rate)
        self.steps += 1
        return {**metrics, "step_applied": True, "skipped": None}

    def update(self, plan: Plan, reader: BatchReader, spec: LossSpec) -> list[dict[str, Any]]:
        """One optimizer step per mini-batch, and the metrics of each. Collective."""
        results = []
        for mini, whole in zip(plan.mini_batches, self._denominators(plan, reader, spec), strict=True):
            metrics = self._backward(mini, reader, spec, max(whole, 1.0))
            self._pending = (spec.mode, 1.0 if metrics.pop("denominator") else 0.0)
            results.append({**metrics, **self.step()})
        return results

    def _denominators(self, plan: Plan, reader: BatchReader, spec: LossSpec) -> list[float]:
        """The global denominator of every mini-batch, known from the masks before any forward. Collective.

        Dividing before the backward, not at the step, gives the bits of a plain loop even where a family's norms
        compute in float32 whatever the dtype, and so round gradients by their scale.
        """
        counts = torch.zeros(len(plan.mini_batches), dtype=torch.float64, device=self._device)
        for number, mini in enumerate(plan.mini_batches):
            for indices in mini.ranks[dist.get_rank()]:
                if indices:
                    counts[number] += denominator(reader.read_scored(indices), spec.mode).item()
        dist.all_reduce(counts)
        totals: list[float] = counts.tolist()
        return totals

    def _backward(self, mini: MiniBatch, reader: BatchReader, spec: LossSpec, divisor: float) -> dict[str, Any]:
        """Run every micro-batch backward on its loss sum over `divisor`; metrics and the `denominator` reached.

        An error on the way drops all gradients: half a batch must never reach a later step.
        """
        try:
            return self._run(mini, reader, spec, divisor)
        except BaseException:
            self._pending = None
            self.optimizer.discard()
            raise

    def _run(self, mini: MiniBatch, reader: BatchReader, spec: LossSpec, divisor: float) -> dict[str, Any]:
        sums = Sums(self._device)
        world = dist.get_world_size()
        reference = self._frozen() if spec.uses_kl and "ref_log_prob" not in reader.names else None
        for indices in mini.ranks[dist.get_rank()]:
            micro = reader.read(indices)
            frozen = micro.values.get("ref_log_prob")
            if reference is not None:
                with torch.no_grad():
                    frozen = reference.score(micro, spec.temperature, entropy=False, all_labels=False)[0]
            log_probs, entropies = self._scorer.score(micro, spec.temperature, entropy=True, all_labels=False)
            loss = loss_sum(log_probs, entropies, frozen, micro, spec, sums)
            (loss * world / divisor).backward()  # type: ignore[no-untyped-call]  # FSDP averages over ranks
        if reference is not None:
            release(reference)
        totals = sums.reduce()
        return {**metrics_of(totals, spec), "denominator": totals["denominator"]}
