"""The operations of a worker group: what each needs, who may run it, and what it takes."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from nexrl_contract.sections import Given

ROLES: tuple[str, ...] = ("actor", "ref", "teacher", "critic", "reward")
FORWARD_ROLES = ("ref", "teacher", "reward")
"""Groups that never train: no optimizer is made for them."""


class Params(Given):
    """Arguments of an operation besides the batch."""


class NoParams(Params):
    """The operation takes nothing."""


class BatchParams(Params):
    """What every operation on a batch takes: ``explain`` answers with the plan and runs nothing."""

    explain: bool = False


class LossParams(BatchParams):
    """``forward_backward``: which loss to accumulate; None takes the group's ``policy_loss``."""

    loss: str | None = Field(default=None, examples=["cross_entropy"])


class DistillParams(BatchParams):
    """``update_actor_with_distillation``: None takes the batch's metadata (coefficient) and the group's configuration."""

    distillation_coeff: float | None = None
    distillation_loss: Literal["policy_gradient", "forward_kl", "reverse_kl"] | None = None


class LogProbParams(BatchParams):
    """``compute_log_prob``: with ``top_k`` also the K most likely tokens of every position, for distillation."""

    top_k: int | None = Field(default=None, ge=1, le=4096)


class OptimParams(Params):
    """``optim_step``: overrides for this one step; ``discard`` drops the gradients instead of applying them."""

    lr: float | None = Field(default=None, ge=0)
    grad_clip: float | None = Field(default=None, gt=0)
    discard: bool = False


class SaveParams(Params):
    """``save_checkpoint``: sharded and resumable, or a full Hugging Face folder when ``saved_fully_shared_ckpt`` is false."""

    local_path: str = Field(min_length=1, max_length=1024, examples=["ckpt/step_1"])
    hdfs_path: str | None = None
    global_step: int = Field(default=0, ge=0)
    saved_fully_shared_ckpt: bool = True
    save_weight_only: bool = False
    remove_previous_ckpt: bool = True


class LoadParams(Params):
    """``load_checkpoint``: a published checkpoint, sharded or Hugging Face."""

    path: str = Field(min_length=1, max_length=1024, examples=["ckpt/step_1"])
    del_local_after_load: bool = True
    load_weight_only: bool = False


class ConvertParams(Params):
    """``convert_checkpoint_to_huggingface``: a published sharded checkpoint, or a new path for the current weights."""

    local_path: str = Field(min_length=1, max_length=1024, examples=["ckpt/step_1"])


@dataclass(frozen=True, slots=True)
class Operation:
    """One row of :data:`OPERATIONS`."""

    name: str
    params: type[Params] = NoParams
    roles: tuple[str, ...] = ROLES
    needs_model: bool = True
    """The group must have run ``init_model``."""
    reads: tuple[str, ...] = field(default=())
    """Tensors it reads, besides ``input_ids`` and the masks."""
    required: tuple[str, ...] = field(default=())

    @property
    def takes_batch(self) -> bool:
        """Whether a batch comes with the request."""
        return issubclass(self.params, BatchParams)


_TEMPERATURE = "temperature"
_TEXT = ("input_ids", "attention_mask", "position_ids", "responses", "loss_mask", "scoring_attention_mask")
_SCORED = (*_TEXT, _TEMPERATURE)
_POLICY = (*_SCORED, "advantages", "old_log_probs", "ref_log_prob", "rollout_log_probs", "loss_weights")
_TOP_K = ("teacher_topk_ids", "teacher_topk_log_probs")
_DISTILL = (*_POLICY[:-1], "teacher_log_probs", *_TOP_K)
_IDS = ("input_ids",)
_SCORERS = ("actor", "ref", "teacher")

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation("init_model", needs_model=False),
        Operation("update_actor", BatchParams, roles=("actor",), reads=_POLICY, required=_IDS),
        Operation("update_actor_with_distillation", DistillParams, roles=("actor",), reads=_DISTILL, required=_IDS),
        Operation("forward_backward", LossParams, roles=("actor",), reads=_POLICY, required=_IDS),
        Operation("optim_step", OptimParams, roles=("actor",)),
        Operation("compute_log_prob", LogProbParams, roles=_SCORERS, reads=_SCORED, required=_IDS),
        Operation("compute_ref_log_prob", BatchParams, roles=_SCORERS, reads=_SCORED, required=_IDS),
        Operation("compute_values", BatchParams, roles=("critic",), reads=_TEXT, required=_IDS),
        Operation(
            "update_critic",
            BatchParams,
            roles=("critic",),
            reads=(*_TEXT, "values", "returns"),
            required=(*_IDS, "returns"),
        ),
        Operation("compute_rewards", BatchParams, roles=("reward",), reads=_TEXT, required=_IDS),
        Operation("save_checkpoint", SaveParams),
        Operation("load_checkpoint", LoadParams),
        Operation("convert_checkpoint_to_huggingface", ConvertParams),
        Operation("barrier", needs_model=False),
        Operation("destroy", needs_model=False),
    )
}
POLICY_LOSSES = ("ppo", "grpo", "gspo", "cispo", "importance_sampling", "reinforce")
LOSSES = (*POLICY_LOSSES, "cross_entropy", "linear")

_DISTILLATION = "update_actor_with_distillation"
_LOOKED_AT = 100
_DISTILLATION_METADATA = ("distillation_coeff", "entropy_coeff", "loss_agg_mode")


def unread_metadata(operation: str, metadata: Mapping[str, Any]) -> list[str]:
    """Keys of a batch's metadata that seem meant to change what is computed, and do nothing in this operation.

    Those that distillation alone reads, and names close to one that is read. Trainers send many others.
    """
    read = {_TEMPERATURE, *(_DISTILLATION_METADATA if operation == _DISTILLATION else ())}
    return [name for name in itertools.islice(metadata, _LOOKED_AT) if name not in read and _seems_meant(name)]


def _seems_meant(name: str) -> bool:
    known = (_TEMPERATURE, *_DISTILLATION_METADATA)
    short = name[:60].lower()
    within = any(word in short or (len(short) > 3 and word.startswith(short)) for word in known)
    return within or bool(difflib.get_close_matches(short, known, n=1, cutoff=0.75))


def required_tensors(operation: str, params: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, ...]:
    """What a batch must hold for this operation with these arguments, in a group of this ``actor`` configuration."""
    needed = OPERATIONS[operation].required
    if operation in ("update_actor", "forward_backward"):
        loss = params.get("loss") or config.get("policy_loss")
        needed += ("advantages",) if loss in POLICY_LOSSES else ("loss_weights",) if loss == "linear" else ()
        needed += _corrected_by(config) if loss in POLICY_LOSSES else ()
    elif operation == _DISTILLATION:
        kind = params.get("distillation_loss") or config.get("distillation_loss")
        if kind in ("forward_kl", "reverse_kl"):
            return needed + _TOP_K
        student = config.get("distillation_student", "current")
        needed += ("teacher_log_probs", *_corrected_by(config), *(() if student == "current" else (student,)))
    return tuple(dict.fromkeys(needed))


def _corrected_by(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What a rollout correction needs; which tokens it drops must be known before any log-probability is."""
    correction = config.get("rollout_correction")
    if correction is None:
        return ()
    drops = correction.get("drop_rejected") and str(correction.get("mode")).endswith("_mask")
    return ("rollout_log_probs", "old_log_probs") if drops else ("rollout_log_probs",)


def unread_tensors(
    operation: str, params: Mapping[str, Any], config: Mapping[str, Any], tensors: Collection[str]
) -> set[str]:
    """Those of a batch's ``tensors`` that the operation knows and that the loss of this ``actor`` does not look at."""
    if operation not in ("update_actor", "forward_backward", _DISTILLATION):
        return set()
    read = set(_SCORED)
    ratio = {"advantages", "old_log_probs", "rollout_log_probs"}
    if operation == _DISTILLATION:
        kind = params.get("distillation_loss") or config.get("distillation_loss")
        read |= set(_TOP_K) if kind in ("forward_kl", "reverse_kl") else {"teacher_log_probs", *ratio}
    else:
        loss = params.get("loss") or config.get("policy_loss")
        read |= ratio if loss in POLICY_LOSSES else {"loss_weights"} if loss == "linear" else set()
        if loss == "reinforce" and "rollout_log_probs" not in tensors:
            read.discard("old_log_probs")
    if config.get("use_kl_loss") and config.get("kl_loss_coef"):
        read |= {"ref_log_prob", "old_log_probs"} if config.get("use_bias_correction_kl") else {"ref_log_prob"}
    return {name for name in OPERATIONS[operation].reads if name in tensors} - read
