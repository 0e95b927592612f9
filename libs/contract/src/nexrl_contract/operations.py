"""The operations of a worker group: what each needs, who may run it, and what it takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Role = Literal["actor", "teacher"]
ROLES: tuple[str, ...] = ("actor", "teacher")


class Params(BaseModel):
    """Arguments of an operation besides the batch; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class NoParams(Params):
    """The operation takes nothing."""


class LossParams(Params):
    """``forward_backward``: which loss to accumulate; None takes the group's ``policy_loss``."""

    loss: str | None = Field(default=None, examples=["cross_entropy"])


class DistillParams(Params):
    """``update_actor_with_distillation``: weight of teacher minus current log-probability."""

    distillation_coeff: float | None = None


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
    takes_batch: bool = False
    roles: tuple[str, ...] = ROLES
    needs_model: bool = True
    """The group must have run ``init_model``."""
    reads: tuple[str, ...] = field(default=())
    """Tensors it reads, besides ``input_ids`` and the masks."""
    required: tuple[str, ...] = field(default=())


_TEXT = ("input_ids", "attention_mask", "position_ids", "responses", "loss_mask", "scoring_attention_mask")
_POLICY = (*_TEXT, "advantages", "old_log_probs", "ref_log_prob", "token_level_scores")
_DISTILL = (*_POLICY, "teacher_log_probs")

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation("init_model", needs_model=False),
        Operation("update_actor", takes_batch=True, roles=("actor",), reads=_POLICY, required=("input_ids",)),
        Operation(
            "update_actor_with_distillation",
            DistillParams,
            takes_batch=True,
            roles=("actor",),
            reads=_DISTILL,
            required=("input_ids", "teacher_log_probs"),
        ),
        Operation(
            "forward_backward",
            LossParams,
            takes_batch=True,
            roles=("actor",),
            reads=_POLICY,
            required=("input_ids",),
        ),
        Operation("optim_step", OptimParams, roles=("actor",)),
        Operation("compute_log_prob", takes_batch=True, reads=_TEXT, required=("input_ids",)),
        Operation("compute_ref_log_prob", takes_batch=True, reads=_TEXT, required=("input_ids",)),
        Operation("save_checkpoint", SaveParams),
        Operation("load_checkpoint", LoadParams),
        Operation("convert_checkpoint_to_huggingface", ConvertParams),
        Operation("barrier", needs_model=False),
        Operation("destroy", needs_model=False),
    )
}
POLICY_LOSSES = ("ppo", "grpo", "importance_sampling", "reinforce")
LOSSES = (*POLICY_LOSSES, "cross_entropy")
