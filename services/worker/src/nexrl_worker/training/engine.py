"""One group's model on one rank, as the runtime calls it. All ranks call a collective together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from nexrl_contract.sections import ActorConfig

from nexrl_worker.training.batch.layout import Rows
from nexrl_worker.training.batch.micro_batch import BatchReader
from nexrl_worker.training.batch.plan import (
    Plan,
    PlanSettings,
    computed_lengths,
    explain_plan,
    make_plan,
)
from nexrl_worker.training.batch.validate import Limits, check_rows, longest
from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.fsdp2 import release
from nexrl_worker.training.inference import FrozenReference, infer
from nexrl_worker.training.model.build import Recipe, build_model, export_dtype
from nexrl_worker.training.model.policy import PolicyModel
from nexrl_worker.training.model.probe import Probe, Prober
from nexrl_worker.training.model.roles import role_of
from nexrl_worker.training.model.rotary import longest_row
from nexrl_worker.training.model.value_head import RewardModel
from nexrl_worker.training.model.weight_sources import folder_tensors
from nexrl_worker.training.model.wrapper import ModelWrapper
from nexrl_worker.training.objectives import objective_of
from nexrl_worker.training.objectives.base import Objective
from nexrl_worker.training.observe.footprint import Load, Room, make_room, peak_mib
from nexrl_worker.training.prepare import Prepared, prepare
from nexrl_worker.training.state import TrainingState
from nexrl_worker.training.trainer import Result, Trainer

Agree = Callable[[Callable[[], Any]], Any]
OLD = "old_log_probs"


class Engine:
    """A sharded model as a role uses it: prepared operations are planned, checked and run on it.

    `state` is what checkpoints hold of it, `frozen` the reference beside it, which `load` and
    `examine` make ready before `check`.
    """

    def __init__(
        self,
        actor: ActorConfig,
        recipe: Recipe,
        model: ModelWrapper,
        outcome: Probe,
        source: Mapping[str, str],
        room: Room,
    ) -> None:
        self._actor = actor
        self._recipe = recipe
        self._role, self._device, self._precision = recipe.role, recipe.device, recipe.precision
        self._model = model
        self._probe = outcome
        self.room = room
        self._trainer = Trainer(model, actor, self._device) if self._role.trains else None
        self.state = TrainingState(
            self._role, model, self._trainer, self._device, source, export_dtype(actor.model)
        )
        self.frozen = FrozenReference(actor, model, outcome.packs, self._device)

    @classmethod
    def build(
        cls, actor: ActorConfig, role: str, device: torch.device, agree: Agree = lambda act: act()
    ) -> Engine:
        """Load `actor.model.path` over all ranks of the default process group as `role` needs it.
        Collective.

        `agree` runs what is local, and may raise on all ranks what one of them raises.
        """
        recipe = Recipe.of(actor, role_of(role), device)
        model: ModelWrapper = agree(lambda: build_model(actor.model.path, recipe))
        outcome = Prober(model, recipe, actor.model.use_remove_padding).run()
        agree(outcome.check)
        if isinstance(model, PolicyModel | RewardModel):
            model.fallback = outcome.reason
        source = agree(lambda: folder_tensors(actor.model.path).stored)
        room = make_room(model, actor, outcome.packs, recipe)
        engine: Engine = agree(lambda: cls(actor, recipe, model, outcome, source, room))
        return engine

    def info(self) -> dict[str, Any]:
        """What this group runs: sizes, dtypes, and whether heads are chunked and rows packed."""
        precision, held = self._precision, self._model.weights()
        return {
            "role": self._role.name,
            "model_type": self._model.config.model_type,
            "parameters": sum(math.prod(part.global_shape) for part in held if not part.replicated),
            "vocab_size": self._model.vocabulary,
            "max_position_embeddings": longest_row(self._model.hf),
            "dtype": str(precision.model).removeprefix("torch."),
            "compute_dtype": str(precision.param).removeprefix("torch."),
            "reduce_dtype": str(precision.reduce).removeprefix("torch."),
            "device": self._device.type,
            "world_size": dist.get_world_size(),
            "chunked_log_probs": self._probe.reason is None,
            "chunked_log_probs_reason": self._probe.reason,
            "packing": self._probe.packs,
            "packing_reason": self._probe.packing_reason,
            "micro_batch_mib": self.room.mib,
            "optimizer_steps": self.state.optimizer_steps,
            "weight_version": self.state.weight_version,
        }

    # -- planning and checking: local, no collectives

    def prepare(self, operation: str, rows: Rows, params: Mapping[str, Any]) -> Prepared:
        """What `operation` will compute; raises InvalidValue or INVALID_TENSOR. Local, pure."""
        prepared = prepare(self._actor, operation, rows, params)
        k, vocabulary = params.get("top_k"), self._model.vocabulary
        if k is not None and k > vocabulary:
            raise InvalidValue(f"top_k is {k}, the model's vocabulary has {vocabulary} tokens")
        if prepared.operation.trains:
            self._training()
        return prepared

    def plan(self, prepared: Prepared, lengths: Sequence[int] | None = None) -> Plan:
        """How the rows are cut for this operation; pure. `lengths`: attended tokens per row, where
        `needs_lengths`.

        What only looks uses the first epoch of the next update's cut, so that the update starts at
        ratio 1.
        """
        actor, operation = self._actor, prepared.operation
        steps = operation.steps or not operation.trains
        mini = (actor.ppo_mini_batch_size or 0) * actor.rollout.n
        seed = f"{actor.seed}:{self.state.optimizer_steps}"
        cut = PlanSettings(
            mini_rows=mini if steps and mini else None,
            epochs=actor.ppo_epochs if operation.steps else 1,
            micro_rows=actor.ppo_micro_batch_size_per_gpu,
            token_budget=actor.ppo_max_token_len_per_gpu if actor.use_dynamic_bsz else None,
            shuffle_seed=seed if steps and actor.shuffle else None,
            packed=self._probe.packs,
            fits=lambda lengths: self.room.need_mib(lengths, self._role.trains) <= self.room.mib,
        )
        return make_plan(prepared.rows.size, dist.get_world_size(), cut, lengths)

    def needs_lengths(self, prepared: Prepared) -> bool:
        """Whether `plan` has to know the lengths of the rows: else they fit, however cut."""
        rows = -(-prepared.rows.size // dist.get_world_size())
        some = min(self._actor.ppo_micro_batch_size_per_gpu or rows, rows)
        whole = [prepared.checked.sequence] * some
        return self._actor.use_dynamic_bsz or self.room.need_mib(whole, trains=True) > self.room.mib

    def check(self, prepared: Prepared, plan: Plan) -> None:
        """Raise InvalidValue if this rank's rows cannot be used, or the operation cannot follow the
        last one. Local."""
        rows, layout, steps = prepared.rows, prepared.layout, len(plan.mini_batches)
        if prepared.loss is not None:
            accumulates = not prepared.operation.steps
            self._training().check(prepared.loss.aggregation, accumulates)
            if prepared.loss.reads_old and steps > 1 and not rows.has(OLD):
                message = f"{steps} optimizer steps on one batch need {OLD}"
                raise InvalidValue(message, tensor=OLD, expected="[B,S] or [B,R]", actual="missing")
        with_reference = self.uses_reference(prepared)
        if with_reference:
            self.frozen.check()
        mine = plan.rows_of(dist.get_rank())
        check_rows(rows, layout, self._limits(with_reference), prepared.checked.names, mine)
        self.room.check_row(*longest(rows, layout, mine), prepared.operation.trains)

    def explain(self, prepared: Prepared, plan: Plan, lengths: Sequence[int]) -> dict[str, Any]:
        """What the plan means for rows of these lengths, with the peak memory of the largest rank.
        Collective."""
        packed, config, operation = self._probe.packs, self._actor, prepared.operation
        mine = [micro for mini in plan.mini_batches for micro in mini.ranks[dist.get_rank()]]
        keeps = config.fsdp_config.gradient_sync == "mini_batch"
        load = Load(
            micros=[computed_lengths(micro, lengths, packed) for micro in mine],
            trains=operation.trains,
            first_step=operation.steps and self.state.optimizer_steps == 0,
            keeps_gradients=keeps and len(plan.mini_batches[0].ranks[0]) > 1,
            reference=self.uses_reference(prepared),
            compute_bytes=self._precision.param.itemsize,
        )
        mib = peak_mib(self._model, self.room.activations, load, self._device)
        peak = torch.tensor([mib], dtype=torch.float64, device=self._device)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        return {
            "operation": operation.name,
            **explain_plan(plan, lengths, packed),
            "packing": packed,
            "gradient_sync": config.fsdp_config.gradient_sync if operation.trains else None,
            "micro_batch_mib": self.room.mib,
            "peak_memory_mib": float(peak),
        }

    # -- training

    def accumulate(self, prepared: Prepared, plan: Plan) -> Result:
        """forward_backward: add the batch's unnormalised loss gradients to those pending.
        Collective.

        Metrics are over all ranks, `actor/tokens` and `actor/rows` among them.
        """
        with self._objective(prepared) as objective:
            return self._training().accumulate(plan, self._reader(prepared), objective)

    def step(
        self, lr: float | None = None, grad_clip: float | None = None, discard: bool = False
    ) -> dict[str, Any]:
        """optim_step: divide the pending gradients by their denominator, clip, step. Collective.

        `lr` and `grad_clip` override the schedule and the configuration once. Takes no step
        (`step_applied` False, `skipped` says why) when there is nothing to learn from or the
        gradient is not finite.
        """
        result = self._training().step("actor", lr, grad_clip, discard)
        self.state.weight_version += int(result["step_applied"])
        return result

    def update(self, prepared: Prepared, plan: Plan) -> list[Result]:
        """Accumulate and step once per mini-batch; one result for each. Collective."""
        with self._objective(prepared) as objective:
            results = self._training().update(plan, self._reader(prepared), objective)
        self.state.weight_version += sum(int(result.metrics["step_applied"]) for result in results)
        return results

    # -- inference

    def compute(self, prepared: Prepared, plan: Plan) -> Result:
        """A read-only operation: by result name this rank's (row indices, values on the CPU).
        Collective.

        compute_ref_log_prob scores with the frozen weights of `ref.model.path` (else `model.path`),
        read at first use.
        """
        model = self.reference() if prepared.reads_reference else self._model
        micros = [micro for mini in plan.mini_batches for micro in mini.ranks[dist.get_rank()]]
        name, k = prepared.operation.name, prepared.params.get("top_k")
        try:
            return infer(name, model, self._reader(prepared), micros, k)
        finally:
            release(model)

    # -- the frozen reference

    def uses_reference(self, prepared: Prepared) -> bool:
        """Whether a model besides the group's own takes part."""
        return prepared.reads_reference and not self._is_reference

    def reference(self) -> PolicyModel:
        """The frozen model: the group's own while it holds those weights, else one read at first
        use. Collective."""
        return cast(PolicyModel, self._model) if self._is_reference else self.frozen.policy()

    # -- inside

    @contextmanager
    def _objective(self, prepared: Prepared) -> Iterator[Objective]:
        """What the operation minimises; what it gathers besides the trained model is freed."""
        objective = objective_of(prepared, self._model, self.reference)
        try:
            yield objective
        finally:
            for model in objective.models[1:]:
                release(model)

    def _training(self) -> Trainer:
        if self._trainer is None:
            raise InvalidValue(f"a group of role {self._role.name} does not train")
        return self._trainer

    @property
    def _is_reference(self) -> bool:
        """Whether the group does not learn and still holds its reference's weights."""
        same = self.frozen.path == self._actor.model.path
        return same and not self._role.trains and self.state.unchanged

    def _reader(self, prepared: Prepared) -> BatchReader:
        return BatchReader(
            prepared.rows,
            prepared.layout,
            prepared.checked.names,
            self._device,
            self._precision.batch,
            self._probe.packs,
            prepared.dropping,
            prepared.temperature,
        )

    def _limits(self, with_reference: bool = False) -> Limits:
        models = [self._model, *([self.frozen.model] if with_reference else [])]
        known = [model.positions for model in models if model is not None]
        most = min((one for one in known if one is not None), default=None)
        limits = Limits(self._model.vocabulary, most)
        return self._model.own_limits(limits) if isinstance(self._model, RewardModel) else limits
