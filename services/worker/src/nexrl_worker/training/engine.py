"""One group's model on one rank: what the runtime calls. Ranks run every collective method together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from nexrl_worker.training.batch import BatchReader, Layout, Rows
from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.fingerprint import partial_fingerprint, weight_table
from nexrl_worker.training.model import Precision, build_scorer
from nexrl_worker.training.optim import Schedule
from nexrl_worker.training.parallelize import release
from nexrl_worker.training.plan import Cut, Plan, make_plan
from nexrl_worker.training.probe import Probe, probe
from nexrl_worker.training.rng import rng_state, set_rng_state
from nexrl_worker.training.scorer import Scorer
from nexrl_worker.training.spec import DISTILLATION, LossSpec, loss_spec, needed_tensors, temperature_of
from nexrl_worker.training.trainer import Trainer
from nexrl_worker.training.validate import Limits, check_rows
from nexrl_worker.training.weights import (
    Reader,
    Shard,
    fill,
    gather,
    load_parameters,
    parameter_shards,
    persistent_buffers,
)

Agree = Callable[[Callable[[], Any]], Any]
UPDATES = ("update_actor", DISTILLATION)
SCORES = ("compute_log_prob", "compute_ref_log_prob")


class Engine:
    """A sharded model, its optimizer (none for a teacher) and the gradients that await a step."""

    def __init__(self, actor: Any, role: str, device: torch.device, scorer: Scorer, outcome: Probe) -> None:
        self._actor = actor
        self._role = role
        self._device = device
        self._scorer = scorer
        self._probe = outcome
        self._reference: Scorer | None = None
        self._trainer = Trainer(scorer, actor, device, self.reference) if role == "actor" else None
        self.weight_version = 0

    @classmethod
    def build(cls, actor: Any, role: str, device: torch.device, agree: Agree = lambda act: act()) -> Engine:
        """Load `actor.model.path` over all ranks of the default process group. Roles: actor, teacher. Collective.

        `agree` runs what is local, and may raise on all ranks what one of them raises.
        """
        if role not in ("actor", "teacher"):
            raise InvalidValue(f"unknown role {role!r}", expected="actor, teacher", actual=role)
        if role == "actor":
            agree(lambda: Schedule(actor.optim))  # refuses a bad schedule before anything is loaded
        precision = Precision.of(actor.fsdp_config, device)
        scorer: Scorer = agree(lambda: _build(actor, actor.model.path, device, trainable=role == "actor"))
        outcome = probe(scorer, device, precision.param)
        scorer.fallback = outcome.reason
        release(scorer)
        engine: Engine = agree(lambda: cls(actor, role, device, scorer, outcome))
        return engine

    def info(self) -> dict[str, Any]:
        """What this group runs: sizes, dtypes, and whether log-probabilities are chunked (or why not)."""
        precision = Precision.of(self._actor.fsdp_config, self._device)
        return {
            "role": self._role,
            "model_type": self._scorer.hf.config.model_type,  # type: ignore[union-attr]
            "parameters": sum(math.prod(part.global_shape) for part in parameter_shards(self._scorer.hf)),
            "vocab_size": self._scorer.vocabulary,
            "max_position_embeddings": self._limits().positions,
            "dtype": str(precision.model).removeprefix("torch."),
            "compute_dtype": str(precision.param).removeprefix("torch."),
            "reduce_dtype": str(precision.reduce).removeprefix("torch."),
            "device": self._device.type,
            "world_size": dist.get_world_size(),
            "chunked_log_probs": self._probe.reason is None,
            "chunked_log_probs_reason": self._probe.reason,
            "optimizer_steps": self.optimizer_steps,
            "weight_version": self.weight_version,
        }

    @property
    def pending(self) -> bool:
        """True while gradients of forward_backward await optim_step."""
        return self._trainer is not None and self._trainer.pending

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps applied so far: the schedule's position; 0 for a teacher."""
        return 0 if self._trainer is None else self._trainer.steps

    # -- planning and checking: local, no collectives ---------------------------------------------------------------

    def plan(self, operation: str, size: int, lengths: Sequence[int] | None = None) -> Plan:
        """How `size` rows are cut for this operation; pure. `lengths`: attended tokens per row (use_dynamic_bsz).

        Log-probabilities use the first epoch of the next update's cut, so that the update starts at ratio 1.
        """
        actor = self._actor
        steps = operation in UPDATES or operation in SCORES
        mini = actor.ppo_mini_batch_size * actor.rollout.n if steps and actor.ppo_mini_batch_size else None
        cut = Cut(
            mini_rows=mini,
            epochs=actor.ppo_epochs if operation in UPDATES else 1,
            micro_rows=actor.ppo_micro_batch_size_per_gpu,
            token_budget=actor.ppo_max_token_len_per_gpu if actor.use_dynamic_bsz else None,
            shuffle_seed=f"{actor.seed}:{self.optimizer_steps}" if steps and actor.shuffle else None,
        )
        return make_plan(operation, size, dist.get_world_size(), cut, lengths)

    def check(self, operation: str, plan: Plan, rows: Rows, params: Mapping[str, Any]) -> None:
        """Raise InvalidValue if this rank's rows or the parameters cannot be used. Local: no collective."""
        layout = Layout.of(rows)
        names: tuple[str, ...] = ()
        if operation in SCORES:
            temperature_of(self._actor, rows, params)
        else:
            spec = self._spec(operation, rows, params)
            names = needed_tensors(spec, rows, layout)
            self._training().check(plan, rows, spec, accumulates=operation not in UPDATES)
        limits = self._limits(self._uses_reference(operation, rows, params))
        check_rows(rows, layout, limits, names, plan.rows_of(dist.get_rank()))

    def lacks_reference(self, operation: str, rows: Rows, params: Mapping[str, Any]) -> bool:
        """Whether `reference` has to come before this operation; raises InvalidValue for bad parameters. Local."""
        return self._reference is None and self._uses_reference(operation, rows, params)

    # -- training ---------------------------------------------------------------------------------------------------

    def accumulate(self, plan: Plan, rows: Rows, params: Mapping[str, Any]) -> dict[str, Any]:
        """forward_backward: add the batch's unnormalised loss gradients to those pending. Collective.

        Returns metrics over all ranks, `actor/tokens` and `actor/rows` among them.
        """
        spec = self._spec(plan.operation, rows, params)
        return self._training().accumulate(plan, self._batch_reader(rows, spec), spec)

    def step(self, lr: float | None = None, grad_clip: float | None = None, discard: bool = False) -> dict[str, Any]:
        """optim_step: divide the pending gradients by their count, clip, step. Collective.

        `lr` and `grad_clip` override the schedule and the configuration once. Takes no step (`step_applied` False,
        `skipped` says why) when there is nothing to learn from or the gradient is not finite.
        """
        result = self._training().step(lr, grad_clip, discard)
        self.weight_version += int(result["step_applied"])
        return result

    def update(self, plan: Plan, rows: Rows, params: Mapping[str, Any]) -> dict[str, Any]:
        """update_actor: accumulate and step once per mini-batch. Collective.

        Every metric is a number for a single optimizer step, else a list with one entry per step (None where a
        skipped step has no such number).
        """
        spec = self._spec(plan.operation, rows, params)
        results = self._training().update(plan, self._batch_reader(rows, spec), spec)
        self.weight_version += sum(int(result["step_applied"]) for result in results)
        if len(results) == 1:
            return results[0]
        names = sorted({name for result in results for name in result})
        return {name: [result.get(name) for result in results] for name in names}

    # -- log-probabilities ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def log_probs(
        self, plan: Plan, rows: Rows, params: Mapping[str, Any], reference: bool = False
    ) -> list[tuple[list[int], Tensor]]:
        """This rank's (row indices, [n,R] float32 on the CPU); 0 where a token is not attended. Collective.

        `reference` scores with the frozen weights of `ref.model.path` (else `model.path`), read at first use.
        """
        scorer = self.reference() if reference else self._scorer
        temperature = temperature_of(self._actor, rows, params)
        reader = BatchReader(rows, Layout.of(rows), (), self._device, self._float())
        answers: list[tuple[list[int], Tensor]] = []
        for mini in plan.mini_batches:
            for indices in mini.ranks[dist.get_rank()]:
                scores, _ = scorer.score(reader.read(indices), temperature, entropy=False, all_labels=True)
                if indices:
                    answers.append((list(indices), scores.float().cpu()))
        release(scorer)
        return answers

    # -- state ------------------------------------------------------------------------------------------------------

    def shards(self, optimizer: bool = True) -> Iterator[Shard]:
        """This rank's part of the state: parameters, saved buffers (rank 0), and the moments if there are any."""
        yield from parameter_shards(self._scorer.hf)
        if dist.get_rank() == 0:
            for name, buffer in persistent_buffers(self._scorer.hf):
                yield Shard(name, buffer, tuple(buffer.shape), 0)
        if optimizer and self._trainer is not None:
            yield from self._trainer.optimizer.shards()

    def load_shards(self, reader: Reader, optimizer: bool = True) -> None:
        """Overwrite weights, and moments unless `optimizer` is False, with this rank's rows from `reader`."""
        load_parameters(self._scorer.hf, reader)
        if optimizer and self._trainer is not None:
            for part in self._trainer.optimizer.shards():
                fill(part, reader)
        self.weight_version += 1

    def scalars(self) -> dict[str, int]:
        """What is not a tensor: steps taken (the schedule's position), AdamW's own count, weight version."""
        taken = 0 if self._trainer is None else self._trainer.optimizer.steps
        return {
            "optimizer_steps": self.optimizer_steps,
            "adamw_steps": taken,
            "weight_version": self.weight_version,
        }

    def load_scalars(self, scalars: Mapping[str, int]) -> None:
        """Restore what `scalars` returned."""
        self.weight_version = int(scalars["weight_version"])
        if self._trainer is not None:
            self._trainer.steps = int(scalars["optimizer_steps"])
            self._trainer.optimizer.steps = int(scalars["adamw_steps"])

    def rng_state(self) -> dict[str, Any]:
        """This rank's generators, JSON-able."""
        return rng_state()

    def set_rng_state(self, state: dict[str, Any]) -> None:
        """Restore what `rng_state` returned."""
        set_rng_state(state)

    def full_weights(self) -> Iterator[tuple[str, Tensor | None]]:
        """Names and tensors as transformers saves them, one at a time: whole on rank 0, None elsewhere. Collective."""
        for part in parameter_shards(self._scorer.hf):
            yield part.name, gather(part)
        for name, buffer in persistent_buffers(self._scorer.hf):
            yield name, buffer.detach().cpu() if dist.get_rank() == 0 else None

    def fingerprint(self) -> int:
        """64-bit number of the current weights, the same at any world size; see fingerprint.py. Collective."""
        table = weight_table(self._device)
        total = torch.zeros((), dtype=torch.int64, device=self._device)
        for part in self.shards(optimizer=False):
            row = math.prod(part.global_shape[1:])
            total += partial_fingerprint(part.name, part.local_tensor, part.offset_dim0 * row, table)
        dist.all_reduce(total)
        return int(total) % (1 << 64)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _training(self) -> Trainer:
        if self._trainer is None:
            raise InvalidValue(f"a group of role {self._role} does not train")
        return self._trainer

    def _uses_reference(self, operation: str, rows: Rows, params: Mapping[str, Any]) -> bool:
        if operation in SCORES:
            return operation == "compute_ref_log_prob"
        return self._spec(operation, rows, params).uses_kl and not rows.has("ref_log_prob")

    def reference(self) -> Scorer:
        """The frozen model, read at first use; raises InvalidValue where that of `ref.model.path` does not fit. Local."""
        if self._reference is None:
            path = (self._actor.ref.model.path if self._actor.ref else None) or self._actor.model.path
            reference = _build(self._actor, path, self._device, trainable=False)
            known, needed = reference.vocabulary, self._scorer.vocabulary
            if known < needed:
                raise InvalidValue(f"the reference model in {path} knows {known} tokens, the group's model {needed}")
            reference.fallback = self._scorer.fallback
            self._reference = reference
        return self._reference

    def _spec(self, operation: str, rows: Rows, params: Mapping[str, Any]) -> LossSpec:
        return loss_spec(self._actor, operation, rows, params)

    def _batch_reader(self, rows: Rows, spec: LossSpec) -> BatchReader:
        layout = Layout.of(rows)
        return BatchReader(rows, layout, needed_tensors(spec, rows, layout), self._device, self._float())

    def _float(self) -> torch.dtype:
        precision = Precision.of(self._actor.fsdp_config, self._device)
        return torch.float64 if precision.model == torch.float64 else torch.float32

    def _limits(self, with_reference: bool = False) -> Limits:
        scorers = [self._scorer, self._reference] if with_reference and self._reference else [self._scorer]
        known = [getattr(scorer.hf.config, "max_position_embeddings", None) for scorer in scorers]
        return Limits(self._scorer.vocabulary, min((most for most in known if most is not None), default=None))


def _build(actor: Any, path: str, device: torch.device, trainable: bool) -> Scorer:
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    precision = Precision.of(actor.fsdp_config, device)
    return build_scorer(
        path, precision, mesh, device, trainable and actor.model.enable_gradient_checkpointing, trainable
    )
