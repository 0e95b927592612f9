"""One group's model on one rank: what the runtime calls. Ranks run every collective method together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from nexrl_contract.batch import CheckedBatch, check_batch
from nexrl_contract.operations import OPERATIONS
from nexrl_contract.sections import ActorConfig

from nexrl_worker.training.batch import BatchReader, Layout, Rows
from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.explain import computed_lengths, explain_plan
from nexrl_worker.training.footprint import Load, Room, make_room, peak_mib
from nexrl_worker.training.heads import RewardModel, ValueModel
from nexrl_worker.training.kinds import kind_of
from nexrl_worker.training.losses.correction import Correction
from nexrl_worker.training.losses.value import ValueLoss
from nexrl_worker.training.model import Precision, export_dtype, load_root
from nexrl_worker.training.objectives.base import Objective
from nexrl_worker.training.objectives.policy import PolicyObjective
from nexrl_worker.training.objectives.top_k import TopKObjective
from nexrl_worker.training.objectives.value import ValueObjective
from nexrl_worker.training.optim import Schedule
from nexrl_worker.training.parallelize import release
from nexrl_worker.training.plan import Cut, Plan, make_plan
from nexrl_worker.training.probe import Probe, probed, strictest
from nexrl_worker.training.queries import answered
from nexrl_worker.training.reference import FrozenReference
from nexrl_worker.training.roots import Root, longest_row
from nexrl_worker.training.scorer import Scorer
from nexrl_worker.training.sources import folder_tensors
from nexrl_worker.training.spec import aggregation_of, loss_spec, temperature_of
from nexrl_worker.training.state import TrainingState
from nexrl_worker.training.trainer import Parts, Result, Trainer
from nexrl_worker.training.validate import Limits, check_rows, longest
from nexrl_worker.training.weights import parameter_shards

Agree = Callable[[Callable[[], Any]], Any]


class Engine(TrainingState):
    """A sharded model, its optimizer (none where the role does not learn) and the gradients that await a step."""

    def __init__(
        self, actor: ActorConfig, role: str, root: Root, outcome: Probe, source: Mapping[str, str], room: Room
    ) -> None:
        kind, device = kind_of(role), room.device
        trainer = Trainer(root, actor, device) if kind.trains else None
        super().__init__(kind, root, trainer, device, source, export_dtype(actor.model))
        self._actor = actor
        self._role = role
        self._probe = outcome
        self.room = room
        self._wide = _wide(Precision.of(actor.fsdp_config, device))
        self._reference = FrozenReference(actor, root, outcome.packs, device)

    @classmethod
    def build(cls, actor: ActorConfig, role: str, device: torch.device, agree: Agree = lambda act: act()) -> Engine:
        """Load `actor.model.path` over all ranks of the default process group as `role` needs it. Collective.

        `agree` runs what is local, and may raise on all ranks what one of them raises.
        """
        kind = kind_of(role)
        if kind.trains:
            agree(lambda: Schedule(actor.optim))  # refuses a bad schedule before anything is loaded
        precision = Precision.of(actor.fsdp_config, device)
        root: Root = agree(lambda: load_root(actor, actor.model.path, device, kind, kind.trains))
        outcome = strictest(probed(root, device, precision.param, actor.model.use_remove_padding), device)
        agree(outcome.check)
        if isinstance(root, Scorer | RewardModel):
            root.fallback = outcome.reason
        source = agree(lambda: folder_tensors(actor.model.path).stored)
        room = make_room(root, actor, kind.trains, outcome.packs, device, _wide(precision))
        engine: Engine = agree(lambda: cls(actor, role, root, outcome, source, room))
        return engine

    def info(self) -> dict[str, Any]:
        """What this group runs: sizes, dtypes, and whether log-probabilities are chunked and rows packed (or why not)."""
        precision = Precision.of(self._actor.fsdp_config, self._device)
        return {
            "role": self._role,
            "model_type": self._root.hf.config.model_type,  # type: ignore[union-attr]
            "parameters": sum(math.prod(part.global_shape) for part in parameter_shards(self._root.hf)),
            "vocab_size": self._root.vocabulary,
            "max_position_embeddings": longest_row(self._root.hf),
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
            "optimizer_steps": self.optimizer_steps,
            "weight_version": self.weight_version,
        }

    # -- planning and checking: local, no collectives ---------------------------------------------------------------

    def plan(self, operation: str, size: int, lengths: Sequence[int] | None = None) -> Plan:
        """How `size` rows are cut for this operation; pure. `lengths`: attended tokens per row (use_dynamic_bsz).

        What only looks uses the first epoch of the next update's cut, so that the update starts at ratio 1.
        """
        actor = self._actor
        row = OPERATIONS[operation]
        steps = row.steps or not row.trains
        mini = actor.ppo_mini_batch_size * actor.rollout.n if steps and actor.ppo_mini_batch_size else None
        cut = Cut(
            mini_rows=mini,
            epochs=actor.ppo_epochs if row.steps else 1,
            micro_rows=actor.ppo_micro_batch_size_per_gpu,
            token_budget=actor.ppo_max_token_len_per_gpu if actor.use_dynamic_bsz else None,
            shuffle_seed=f"{actor.seed}:{self.optimizer_steps}" if steps and actor.shuffle else None,
            packed=self._probe.packs,
            fits=lambda lengths: self.room.need_mib(lengths, self._kind.trains) <= self.room.mib,
        )
        return make_plan(operation, size, dist.get_world_size(), cut, lengths)

    def needs_lengths(self, size: int, width: int) -> bool:
        """Whether `plan` has to know the lengths of `size` rows of `width` tokens: else they fit, however they are cut."""
        rows = -(-size // dist.get_world_size())
        some = min(self._actor.ppo_micro_batch_size_per_gpu or rows, rows)
        return self._actor.use_dynamic_bsz or self.room.need_mib([width] * some, trains=True) > self.room.mib

    def check(self, operation: str, plan: Plan, rows: Rows, params: Mapping[str, Any]) -> None:
        """Raise InvalidValue if this rank's rows or the parameters cannot be used. Local: no collective."""
        checked = self._checked(operation, rows, params)
        layout = Layout(checked.sequence, checked.response)
        temperature_of(self._actor, rows)
        if not OPERATIONS[operation].trains:
            _check_top_k(params.get("top_k"), self._root.vocabulary)
        elif operation == "update_critic":
            self._training()
        else:
            self._check_policy(operation, plan, rows, params)
        with_reference = self._uses_frozen(operation, rows, params)
        if with_reference:
            self._reference.check()
        mine = plan.rows_of(dist.get_rank())
        check_rows(rows, layout, self._limits(with_reference), checked.names, mine)
        self.room.check_row(*longest(rows, layout, mine), OPERATIONS[operation].trains)

    def lacks_reference(self, operation: str, rows: Rows, params: Mapping[str, Any]) -> bool:
        """Whether `load_reference` and `examine_reference` must come first; raises InvalidValue for bad parameters. Local."""
        return self._uses_frozen(operation, rows, params) and not self._reference.ready

    def explain(self, plan: Plan, rows: Rows, lengths: Sequence[int], params: Mapping[str, Any]) -> dict[str, Any]:
        """What the plan means for rows of these lengths, with the peak memory of the largest rank. Collective."""
        packed, config = self._probe.packs, self._actor
        trains = OPERATIONS[plan.operation].trains
        mine = [micro for mini in plan.mini_batches for micro in mini.ranks[dist.get_rank()]]
        load = Load(
            micros=[computed_lengths(micro, lengths, packed) for micro in mine],
            trains=trains,
            first_step=OPERATIONS[plan.operation].steps and self.optimizer_steps == 0,
            keeps_gradients=config.fsdp_config.gradient_sync == "mini_batch" and len(plan.mini_batches[0].ranks[0]) > 1,
            reference=self._uses_frozen(plan.operation, rows, params),
            compute_bytes=Precision.of(config.fsdp_config, self._device).param.itemsize,
        )
        peak = torch.tensor([peak_mib(self._root, self.room.activations, load, self._device)], dtype=torch.float64)
        peak = peak.to(self._device)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        return {
            **explain_plan(plan, lengths, packed),
            "packing": packed,
            "gradient_sync": config.fsdp_config.gradient_sync if trains else None,
            "micro_batch_mib": self.room.mib,
            "peak_memory_mib": float(peak),
        }

    # -- training ---------------------------------------------------------------------------------------------------

    def accumulate(self, plan: Plan, rows: Rows, params: Mapping[str, Any]) -> Result:
        """forward_backward: add the batch's unnormalised loss gradients to those pending. Collective.

        Metrics are over all ranks, `actor/tokens` and `actor/rows` among them.
        """
        objective, reader = self._prepared(plan.operation, rows, params)
        try:
            return self._training().accumulate(plan, reader, objective)
        finally:
            objective.close()

    def step(self, lr: float | None = None, grad_clip: float | None = None, discard: bool = False) -> dict[str, Any]:
        """optim_step: divide the pending gradients by their denominator, clip, step. Collective.

        `lr` and `grad_clip` override the schedule and the configuration once. Takes no step (`step_applied` False,
        `skipped` says why) when there is nothing to learn from or the gradient is not finite.
        """
        result = self._training().step("actor", lr, grad_clip, discard)
        self.weight_version += int(result["step_applied"])
        return result

    def update(self, plan: Plan, rows: Rows, params: Mapping[str, Any]) -> list[Result]:
        """Accumulate and step once per mini-batch; one result for each. Collective."""
        objective, reader = self._prepared(plan.operation, rows, params)
        try:
            results = self._training().update(plan, reader, objective)
        finally:
            objective.close()
        self.weight_version += sum(int(result.metrics["step_applied"]) for result in results)
        return results

    # -- looking ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def compute(self, plan: Plan, rows: Rows, params: Mapping[str, Any]) -> dict[str, Parts]:
        """An operation of queries.py: by result name this rank's (row indices, values on the CPU). Collective.

        compute_ref_log_prob scores with the frozen weights of `ref.model.path` (else `model.path`), read at first use.
        """
        root = self.reference() if plan.operation == "compute_ref_log_prob" else self._root
        reader = self._reader(rows, ())
        answers: dict[str, Parts] = {}
        try:
            for mini in plan.mini_batches:
                for indices in mini.ranks[dist.get_rank()]:
                    found = answered(plan.operation, root, reader, indices, params.get("top_k"))
                    for name, values in found.items():
                        parts = answers.setdefault(name, [])  # for a dummy too: all ranks answer with the same names
                        parts += [(list(indices), values)] if indices else []
        finally:
            release(root)
        return answers

    def load_reference(self) -> None:
        """Read the frozen model; raises InvalidValue where that of `ref.model.path` does not fit. Local."""
        self._reference.load()

    def examine_reference(self) -> None:
        """After `load_reference` on all ranks: find out how it may be computed, for `check` to refuse it. Collective."""
        self._reference.examine()

    def reference(self) -> Scorer:
        """The frozen model: the group's own while it holds those weights, else one read at first use. Collective."""
        return cast(Scorer, self._root) if self._is_reference else self._reference.scorer()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _training(self) -> Trainer:
        if self._trainer is None:
            raise InvalidValue(f"a group of role {self._role} does not train")
        return self._trainer

    def _checked(self, operation: str, rows: Rows, params: Mapping[str, Any]) -> CheckedBatch:
        return check_batch(rows.header, OPERATIONS[operation], params, self._actor)

    def _check_policy(self, operation: str, plan: Plan, rows: Rows, params: Mapping[str, Any]) -> None:
        spec = loss_spec(self._actor, operation, rows, params)
        self._training().check(spec.aggregation, accumulates=not OPERATIONS[operation].steps)
        steps = len(plan.mini_batches)
        if spec.reads_old and steps > 1 and not rows.has("old_log_probs"):
            message = f"{steps} optimizer steps on one batch need old_log_probs"
            raise InvalidValue(message, tensor="old_log_probs", expected="[B,S] or [B,R]", actual="missing")

    def _uses_frozen(self, operation: str, rows: Rows, params: Mapping[str, Any]) -> bool:
        """Whether a second model, the frozen reference, takes part."""
        if self._is_reference or operation == "update_critic":
            return False
        if not OPERATIONS[operation].trains:
            return operation == "compute_ref_log_prob"
        return loss_spec(self._actor, operation, rows, params).uses_kl and not rows.has("ref_log_prob")

    @property
    def _is_reference(self) -> bool:
        """Whether a group that does not learn still holds the weights that its reference would be read from."""
        return not self._kind.trains and self.unchanged and self._reference.path == self._actor.model.path

    def _prepared(self, operation: str, rows: Rows, params: Mapping[str, Any]) -> tuple[Objective, BatchReader]:
        names = self._checked(operation, rows, params).names
        objective: Objective
        dropping = None
        if operation == "update_critic":
            loss = ValueLoss(self._actor.cliprange_value)
            objective = ValueObjective(cast(ValueModel, self._root), loss, aggregation_of(self._actor))
        else:
            spec = loss_spec(self._actor, operation, rows, params)
            make = PolicyObjective if spec.top_k is None else TopKObjective
            objective = make(cast(Scorer, self._root), spec, names, self.reference)
            dropping = spec.correction if spec.correction is not None and spec.correction.drops else None
        return objective, self._reader(rows, names, dropping)

    def _reader(self, rows: Rows, names: tuple[str, ...], dropping: Correction | None = None) -> BatchReader:
        layout, temperature = Layout.of(rows), temperature_of(self._actor, rows)
        return BatchReader(rows, layout, names, self._device, self._wide, self._probe.packs, dropping, temperature)

    def _limits(self, with_reference: bool = False) -> Limits:
        roots = [self._root, self._reference.root] if with_reference and self._reference.root else [self._root]
        known = [root.positions for root in roots]
        limits = Limits(self._root.vocabulary, min((most for most in known if most is not None), default=None))
        return self._root.own_limits(limits) if isinstance(self._root, RewardModel) else limits


def _wide(precision: Precision) -> torch.dtype:
    """Dtype of what a batch brings."""
    return torch.float64 if precision.model == torch.float64 else torch.float32


def _check_top_k(k: int | None, vocabulary: int) -> None:
    if k is not None and k > vocabulary:
        raise InvalidValue(f"top_k is {k}, the model's vocabulary has {vocabulary} tokens")
