"""Gradients and optimizer steps of one rank: accumulate, step, and both together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from nexrl_contract.sections import ActorConfig
from torch import Tensor

from nexrl_worker.training.batch.micro_batch import BatchReader, MicroBatch
from nexrl_worker.training.batch.plan import MiniBatch, Plan
from nexrl_worker.training.errors import DoesNotFit, InvalidValue
from nexrl_worker.training.fsdp2 import synchronise
from nexrl_worker.training.losses.aggregation import Aggregation
from nexrl_worker.training.micro_batch_loop import Parts, drop, run_micro_batches
from nexrl_worker.training.model.wrapper import ModelWrapper
from nexrl_worker.training.objectives.base import MetricAccumulator, Objective, common_metrics
from nexrl_worker.training.observe.costs import Clock, peak_memory
from nexrl_worker.training.optim import Optimizer, Schedule


@dataclass
class Result:
    """Numbers of one optimizer step (or of one accumulation), and by name this rank's (rows, [n,R]
    on the CPU)."""

    metrics: dict[str, Any]
    answers: dict[str, Parts] = field(default_factory=dict)


class Trainer:
    """The optimizer of a sharded model and the gradients that await a step."""

    def __init__(self, model: ModelWrapper, actor: ActorConfig, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._clock = Clock(device)
        self._clock.watch(model.collectives)
        self._sync_always = actor.fsdp_config.gradient_sync == "micro_batch"
        self._grad_clip = actor.grad_clip
        self._schedule = Schedule(actor.optim)
        self.optimizer = Optimizer(model, actor.optim)
        self.steps = 0
        # Aggregation of the pending gradients and what it has counted so far (0: nothing was
        # scored).
        self._pending: tuple[Aggregation, float] | None = None

    @property
    def pending(self) -> bool:
        """True while gradients of `accumulate` await `step`."""
        return self._pending is not None

    def check(self, aggregation: Aggregation, accumulates: bool) -> None:
        """Raise InvalidValue if this operation cannot follow the last one. Local."""
        if self._pending is not None and not accumulates:
            message = "gradients are pending: call optim_step, or optim_step(discard=True), first"
            raise InvalidValue(message)
        if self._pending is not None and self._pending[0] != aggregation:
            before, now = self._pending[0].mode, aggregation.mode
            message = f"pending gradients were accumulated with {before}, not {now}"
            raise InvalidValue(message, expected=before, actual=now)

    def accumulate(self, plan: Plan, reader: BatchReader, objective: Objective) -> Result:
        """Add the batch's unnormalised loss gradients to those pending; metrics over all ranks.
        Collective."""
        with self._measured() as costs:
            result, count = self._backward(plan.mini_batches[0], reader, objective, 1.0)
        before = 0.0 if self._pending is None else self._pending[1]
        self._pending = (objective.aggregation, before + count)
        return Result(result.metrics | costs, result.answers)

    def step(
        self,
        prefix: str,
        lr: float | None = None,
        grad_clip: float | None = None,
        discard: bool = False,
    ) -> dict[str, Any]:
        """Divide the pending gradients, clip, step; `skipped` says why not. Collective."""
        aggregation, count = self._pending or (Aggregation("sum"), 0.0)
        self._pending = None
        if discard:
            self.optimizer.discard()
            return {"step_applied": False, "skipped": "discarded"}
        with self._measured() as costs:
            metrics = self._apply(prefix, count, aggregation.divisor(count), lr, grad_clip)
        return metrics | costs

    def update(self, plan: Plan, reader: BatchReader, objective: Objective) -> list[Result]:
        """One optimizer step per mini-batch, and what each gave. Collective."""
        results: list[Result] = []
        counts = self._counts(plan, reader, objective.aggregation)
        for mini, count in zip(plan.mini_batches, counts, strict=True):
            divisor = objective.aggregation.divisor(count)
            with self._measured() as costs:
                try:
                    result, _ = self._backward(mini, reader, objective, divisor)
                except DoesNotFit as error:
                    # Neither all of the batch was done nor nothing.
                    if any(step.metrics["step_applied"] for step in results):
                        raise MemoryError(str(error)) from None
                    raise
                # The gradients are divided already.
                applied = self._apply(objective.prefix, count, 1.0)
            results.append(Result(result.metrics | applied | costs, result.answers))
        if any("memory/retries" in result.metrics for result in results):
            for result in results:
                result.metrics.setdefault("memory/retries", 0)
        return results

    def _apply(
        self,
        prefix: str,
        count: float,
        divisor: float,
        lr: float | None = None,
        grad_clip: float | None = None,
    ) -> dict[str, Any]:
        """Step on the gradients over `divisor`, unless `count` says that nothing was scored."""
        rate = self._schedule.lr(self.steps) if lr is None else lr
        with self._clock.measure("step"):
            norm = self.optimizer.grad_norm() / divisor if count else 0.0
            metrics: dict[str, Any] = {f"{prefix}/grad_norm": norm, f"{prefix}/lr": rate}
            if count == 0.0 or not math.isfinite(norm):
                self.optimizer.discard()
                reason = "non_finite_gradient" if count else "nothing_to_learn"
                return {**metrics, "step_applied": False, "skipped": reason}
            limit = self._grad_clip if grad_clip is None else grad_clip
            shrink = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
            self.optimizer.step(shrink / divisor, rate)
        self.steps += 1
        return {**metrics, "step_applied": True, "skipped": None}

    @contextmanager
    def _measured(self) -> Iterator[dict[str, float]]:
        """Seconds and MiB of the block, of the worst rank; filled in at a good end. Collective."""
        costs: dict[str, float] = {}
        self._clock.start()
        with peak_memory(self._device) as peak:
            yield costs
        mine = {f"time/{name}_s": value for name, value in self._clock.seconds().items()}
        mine["memory/peak_mib"] = peak.mib
        most = torch.tensor(list(mine.values()), dtype=torch.float64, device=self._device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        costs |= dict(zip(mine, most.tolist(), strict=True))

    def _counts(self, plan: Plan, reader: BatchReader, aggregation: Aggregation) -> list[float]:
        """What every mini-batch's denominator counts, known from the masks before any forward.
        Collective.

        Dividing before the backward, not at the step, gives the bits of a plain loop even where a
        family's norms compute in float32 whatever the dtype, and so round gradients by their scale.
        """
        counts = torch.zeros(len(plan.mini_batches), dtype=torch.float64, device=self._device)
        for number, mini in enumerate(plan.mini_batches):
            for indices in mini.ranks[dist.get_rank()]:
                if indices:
                    counts[number] += aggregation.count(reader.read_scored(indices)).item()
        dist.all_reduce(counts)
        totals: list[float] = counts.tolist()
        return totals

    def _backward(
        self, mini: MiniBatch, reader: BatchReader, objective: Objective, divisor: float
    ) -> tuple[Result, float]:
        """Run every micro-batch backward on its loss sum over `divisor`; the result and the count
        reached.

        An error on the way drops all gradients: half a batch must never reach a later step. But
        where memory runs out on any rank, all begin again with half the rows at a time, and pending
        gradients are kept.
        """
        kept = self.optimizer.set_aside() if self.pending else {}
        finer, retries = mini, 0
        while True:
            try:
                result, count = self._run(finer, reader, objective, divisor)
            except DoesNotFit as error:
                self._drop(objective)
                halved = finer.halved() if error.row is None else None
                if halved is None:
                    self.optimizer.put_back(kept)
                    raise
                finer = halved
                retries += 1
            except BaseException:
                self._drop(objective)
                self._pending = None
                raise
            else:
                self.optimizer.put_back(kept)
                if retries:
                    result.metrics["memory/retries"] = retries
                return result, count

    def _drop(self, objective: Objective) -> None:
        self.optimizer.discard()
        drop(objective.models)

    def _run(
        self, mini: MiniBatch, reader: BatchReader, objective: Objective, divisor: float
    ) -> tuple[Result, float]:
        """Metrics and answers, and the count reached; raises DoesNotFit on all ranks where memory
        ran out on any."""
        accumulator = MetricAccumulator(self._device)

        def act(rows: Sequence[int], last: bool) -> dict[str, Tensor]:
            synchronise(self._model, self._sync_always or last)
            return self._run_micro(reader.read(rows), objective, divisor, accumulator)

        micros = mini.ranks[dist.get_rank()]
        ran = run_micro_batches(objective.models, self._device, micros, act)
        # With the rest: a vote of its own would be one more collective of every micro-batch.
        accumulator.add("failed", ran.failed is not None)
        totals = accumulator.reduce()
        if totals.sums["failed"]:
            raise ran.does_not_fit(self._device)
        metrics = {**common_metrics(objective, totals), **objective.metrics(totals)}
        return Result(metrics, ran.answers), totals.sums["denominator"]

    def _run_micro(
        self,
        micro: MicroBatch,
        objective: Objective,
        divisor: float,
        accumulator: MetricAccumulator,
    ) -> dict[str, Tensor]:
        """Forward and backward; what the objective answers, on the CPU."""
        with self._clock.measure("forward"):
            evaluated = objective.evaluate(micro, accumulator)
        with self._clock.measure("backward"):
            # FSDP averages over ranks, and the numerators are a sum.
            (evaluated.loss * dist.get_world_size() / divisor).backward()  # type: ignore[no-untyped-call]
        return {name: values.float().cpu() for name, values in evaluated.answers.items()}
