"""The operations of a worker group, one row each. Routes, clients, mock and ranks are made from
these rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field

from nexrl_contract import results
from nexrl_contract.losses import DistillationLoss, LossName
from nexrl_contract.sections import Given

ROLES: tuple[str, ...] = ("actor", "ref", "teacher", "critic", "reward")


class Params(Given):
    """Arguments of an operation besides the batch."""


class NoParams(Params):
    """The operation takes nothing."""


class InitializeParams(Params):
    """``initialize_worker``. ``config_dict`` is a whole service entry, or just ``{"actor": ...}``.

    A ``role`` here wins over the entry's; without either it is an actor.
    """

    config_dict: dict[str, Any] | None = Field(
        default=None,
        examples=[{"actor": {"model": {"path": "/models/tiny"}, "optim": {"lr": 1e-3}}}],
    )
    role: str | None = Field(default=None, examples=["actor"])
    world_size: int | None = Field(default=None, ge=1, examples=[2])
    zmq_base_port: Any = None
    dispatch_mode: Any = None
    config_path: str | None = None


class BatchParams(Params):
    """What every operation on a batch takes: ``explain`` answers with the plan and runs nothing."""

    explain: bool = False


class LossParams(BatchParams):
    """``forward_backward``: which loss to accumulate; None takes the group's ``policy_loss``."""

    loss: LossName | None = Field(default=None, examples=["cross_entropy"])


class DistillParams(BatchParams):
    """``update_actor_with_distillation``: None takes the batch's metadata (coefficient) and the
    group's configuration."""

    distillation_coeff: float | None = None
    distillation_loss: DistillationLoss | None = None


class LogProbParams(BatchParams):
    """``compute_log_prob``: with ``top_k`` also the K most likely tokens of every position, for
    distillation."""

    top_k: int | None = Field(default=None, ge=1, le=4096)


class OptimParams(Params):
    """``optim_step``: overrides for this one step; ``discard`` drops the gradients instead of
    applying them."""

    lr: float | None = Field(default=None, ge=0)
    grad_clip: float | None = Field(default=None, gt=0)
    discard: bool = False


class SaveParams(Params):
    """``save_checkpoint``: sharded and resumable, or a full Hugging Face folder when
    ``saved_fully_shared_ckpt`` is false."""

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
    """``convert_checkpoint_to_huggingface``: a published sharded checkpoint, or a new path for the
    current weights."""

    local_path: str = Field(min_length=1, max_length=1024, examples=["ckpt/step_1"])


Changes = Literal["nothing", "gradients", "weights", "files", "group"]
Learned = Literal["policy", "distillation", "values"]
_TEXT = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "responses",
    "loss_mask",
    "scoring_attention_mask",
)
SCORED = (*_TEXT, "temperature")
"""What every operation on a batch of texts reads, whatever it computes of it."""
_POLICY = (*SCORED, "advantages", "old_log_probs", "ref_log_prob", "rollout_log_probs")
TOP_K = ("teacher_topk_ids", "teacher_topk_log_probs")
"""A teacher's candidates: of one K."""
_IDS = ("input_ids",)
_SCORERS = ("actor", "ref", "teacher")


@dataclass(frozen=True, slots=True)
class Operation:
    """One row of :data:`OPERATIONS`."""

    name: str
    summary: str
    params: type[Params] = NoParams
    roles: tuple[str, ...] = ROLES
    changes: Changes = "nothing"
    """What of the group is another afterwards."""
    learns: Learned | None = None
    """What the gradients are for that it makes of a batch; None: it makes none."""
    settings: tuple[str, ...] = ()
    """Keys of a batch's metadata that change what it computes, besides ``temperature``."""
    reads: tuple[str, ...] = ()
    """Tensors of TENSORS that it knows; which of them its loss reads, :mod:`nexrl_contract.batch`
    says."""
    required: tuple[str, ...] = ()
    """Those that it needs whatever the loss."""
    answers: tuple[str, ...] = ()
    """Tensors of TENSORS in its answer, some of them only with certain arguments or losses."""
    answer: type[BaseModel] = results.Answer
    """What it answers, the tensors apart."""
    needs_model: bool = True
    """The group must have run ``init_model``."""
    waits_for_saves: bool = False
    """It runs once the group's earlier saves are published."""
    by_ranks: bool = True
    """The ranks run it; else the gateway and the agents do."""

    @property
    def path(self) -> str:
        """Where it is posted."""
        return "/initialize" if self.name == INITIALIZE else f"/{self.name}"

    @property
    def takes_batch(self) -> bool:
        """Whether a batch comes with the request."""
        return issubclass(self.params, BatchParams)

    @property
    def trains(self) -> bool:
        """Whether it makes gradients of a batch."""
        return self.learns is not None

    @property
    def steps(self) -> bool:
        """Whether it makes gradients of a batch and takes optimizer steps with them."""
        return self.trains and self.changes == "weights"


INITIALIZE, DESTROY = "initialize_worker", "destroy"
DISTILLATION = "update_actor_with_distillation"

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation(
            INITIALIZE,
            "Make a worker group",
            InitializeParams,
            changes="group",
            needs_model=False,
            by_ranks=False,
            answer=results.GroupAnswer,
        ),
        Operation(
            "init_model",
            "Load the model; nothing happens if it is loaded",
            changes="group",
            needs_model=False,
            answer=results.ModelAnswer,
        ),
        Operation(
            "update_actor",
            "One policy update on a batch: forward, backward, optimizer steps",
            BatchParams,
            roles=("actor",),
            learns="policy",
            changes="weights",
            reads=(*_POLICY, "loss_weights"),
            required=_IDS,
            answers=("log_probs",),
            answer=results.UpdateAnswer[results.UpdateMetrics],
        ),
        Operation(
            DISTILLATION,
            "One update towards a teacher's log-probabilities",
            DistillParams,
            roles=("actor",),
            learns="distillation",
            settings=("distillation_coeff", "entropy_coeff", "loss_agg_mode"),
            changes="weights",
            reads=(*_POLICY, "teacher_log_probs", *TOP_K),
            required=_IDS,
            answer=results.UpdateAnswer[results.DistillationMetrics],
        ),
        Operation(
            "forward_backward",
            "Accumulate gradients of a batch",
            LossParams,
            roles=("actor",),
            learns="policy",
            changes="gradients",
            reads=(*_POLICY, "loss_weights"),
            required=_IDS,
            answers=("log_probs",),
            answer=results.BatchAnswer[results.PolicyMetrics],
        ),
        Operation(
            "optim_step",
            "Apply the accumulated gradients, or discard them",
            OptimParams,
            roles=("actor",),
            changes="weights",
            answer=results.StepAnswer,
        ),
        Operation(
            "compute_log_prob",
            "Log-probabilities of the responses under the current weights",
            LogProbParams,
            roles=_SCORERS,
            reads=SCORED,
            required=_IDS,
            answers=("old_log_probs", *TOP_K),
            answer=results.BatchAnswer[results.Metrics],
        ),
        Operation(
            "compute_ref_log_prob",
            "Log-probabilities of the responses under the reference weights",
            BatchParams,
            roles=_SCORERS,
            reads=SCORED,
            required=_IDS,
            answers=("ref_log_prob",),
            answer=results.BatchAnswer[results.Metrics],
        ),
        Operation(
            "compute_values",
            "A critic's values of the response positions",
            BatchParams,
            roles=("critic",),
            reads=_TEXT,
            required=_IDS,
            answers=("values",),
            answer=results.BatchAnswer[results.Metrics],
        ),
        Operation(
            "update_critic",
            "One update of a critic towards returns",
            BatchParams,
            roles=("critic",),
            learns="values",
            changes="weights",
            reads=(*_TEXT, "values", "returns"),
            required=(*_IDS, "returns"),
            answer=results.UpdateAnswer[results.CriticMetrics],
        ),
        Operation(
            "compute_rewards",
            "A reward model's score of every row",
            BatchParams,
            roles=("reward",),
            reads=_TEXT,
            required=_IDS,
            answers=("rewards",),
            answer=results.BatchAnswer[results.Metrics],
        ),
        Operation(
            "save_checkpoint",
            "Save a resumable checkpoint, or a Hugging Face folder for inference engines",
            SaveParams,
            changes="files",
            answer=results.SaveAnswer,
        ),
        Operation(
            "load_checkpoint",
            "Load a published checkpoint",
            LoadParams,
            changes="weights",
            waits_for_saves=True,
            answer=results.LoadAnswer,
        ),
        Operation(
            "convert_checkpoint_to_huggingface",
            "A Hugging Face folder from a checkpoint, or of the current weights",
            ConvertParams,
            changes="files",
            waits_for_saves=True,
            answer=results.ConvertAnswer,
        ),
        Operation(
            "barrier",
            "Wait until everything submitted before has ended",
            needs_model=False,
            waits_for_saves=True,
        ),
        Operation(
            DESTROY,
            "End the group and free its slots",
            changes="group",
            needs_model=False,
            by_ranks=False,
        ),
    )
}

FORWARD_ROLES = tuple(
    role
    for role in ROLES
    if not any(role in row.roles for row in OPERATIONS.values() if row.trains)
)
"""Groups that never train: no optimizer is made for them."""
SETTINGS = (
    "temperature",
    *dict.fromkeys(name for row in OPERATIONS.values() for name in row.settings),
)
"""Keys of a batch's metadata that change what some operation computes."""
