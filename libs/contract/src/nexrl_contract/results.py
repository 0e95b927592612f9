"""What operations answer, one model each. Pages are made from them; what is served is not validated
by them."""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Number = bool | float | Literal["NaN", "Infinity", "-Infinity"] | None
Metric = Number | list[Number]
"""One number, or where a call took several optimizer steps one for each."""
JOB_ID = "019a0c3f5d207c1f8e2a4b6d8f0a1c3e"
"""Of the examples."""


def _metric(name: str, example: bool | float, meaning: str) -> Any:
    return Field(None, alias=name, examples=[example], description=meaning)


class Metrics(BaseModel):
    """Numbers by name; which there are depends on the loss and on the batch: docs/metrics.md."""

    model_config = ConfigDict(extra="allow")


class GradientMetrics(Metrics):
    """Of every forward and backward."""

    forward_s: Metric = _metric("time/forward_s", 0.04, "Seconds of the slowest rank.")
    backward_s: Metric = _metric("time/backward_s", 0.04, "Seconds of the slowest rank.")
    peak_mib: Metric = _metric("memory/peak_mib", 379.1, "The largest rank's peak.")


class PolicyMetrics(GradientMetrics):
    """Of a policy's gradients."""

    loss: Metric = _metric("actor/loss", 0.71, "What was minimised.")
    tokens: Metric = _metric("actor/tokens", 4.0, "Scored tokens.")
    rows: Metric = _metric("actor/rows", 2.0, "Rows with scored tokens.")
    pg_loss: Metric = _metric("actor/pg_loss", 0.71, "The main term alone.")
    entropy: Metric = _metric("actor/entropy_loss", 4.15, "Over the whole vocabulary.")
    ratio_mean: Metric = _metric("actor/ratio_mean", 1.0, "The ratio that the loss used.")
    ppo_kl: Metric = _metric("actor/ppo_kl", 0.0, "How far the policy is from old_log_probs.")


class StepMetrics(Metrics):
    """Of a policy's optimizer step."""

    grad_norm: Metric = _metric("actor/grad_norm", 1.7, "L2 norm before clipping.")
    lr: Metric = _metric("actor/lr", 0.001, "The learning rate of this step.")
    applied: Metric = _metric("step_applied", True, "False where the weights stay.")
    step_s: Metric = _metric("time/step_s", 0.004, "Seconds of the slowest rank.")


class UpdateMetrics(StepMetrics, PolicyMetrics):
    """Of a policy's gradients and steps."""


class DistillationMetrics(UpdateMetrics):
    """Of steps towards a teacher."""

    teacher_kl: Metric = _metric("actor/teacher_kl", 0.3, "From the student to the teacher.")


class CriticMetrics(GradientMetrics):
    """Of a critic's gradients and steps."""

    loss: Metric = _metric("critic/loss", 0.2, "What was minimised.")
    vf_loss: Metric = _metric("critic/vf_loss", 0.2, "The main term alone.")
    values_mean: Metric = _metric("critic/values_mean", 0.4, "Of the values before this step.")
    applied: Metric = _metric("step_applied", True, "False where the weights stay.")


M = TypeVar("M", bound=Metrics)


class JSONTensor(BaseModel):
    """A tensor in JSON: ``data`` is the base64 of its bytes."""

    data: str
    shape: list[int]
    dtype: str
    encoding: Literal["base64"]


class RanksTiming(BaseModel):
    """Seconds."""

    ranks_s: float | None = Field(None, examples=[0.11], description="Of the ranks.")


class Timing(RanksTiming):
    """Seconds."""

    queued_s: float = Field(examples=[0.005])
    run_s: float = Field(examples=[0.15])


class Weights(BaseModel):
    """The weights that a call left behind."""

    weight_version: int | None = Field(None, examples=[1])
    fingerprint: str | None = Field(None, examples=["dcdffb064cbb6937"])
    skipped: Any = Field(None, description="Why a step was not applied.")


class MetaInfo(BaseModel, Generic[M]):
    """What is said beside the metrics, which stand here once more."""

    metrics: M
    job_id: str = Field(examples=[JOB_ID])
    identifier: str = Field(examples=["student"])
    operation: str = Field(examples=["update_actor"])
    ignored: list[str] = Field(description="What of the request does nothing.")
    timing: Timing
    plan: dict[str, Any] | None = Field(None, description="With `explain`: what would be done.")


class UpdateInfo(Weights, MetaInfo[M], Generic[M]):
    """As MetaInfo, and which weights the call left behind."""


class StepInfo(Weights):
    """What ``optim_step`` says beside its metrics."""

    timing: RanksTiming
    ignored: list[str] = Field(description="What of the request does nothing.")


class BatchAnswer(BaseModel, Generic[M]):
    """An operation on a batch: the row's ``answers`` are tensors of ``batch``."""

    batch: dict[str, JSONTensor]
    metrics: M
    meta_info: MetaInfo[M]


class UpdateAnswer(BatchAnswer[M], Generic[M]):
    """An operation on a batch that takes optimizer steps."""

    meta_info: UpdateInfo[M]


class Answer(BaseModel):
    """An operation without a batch."""

    status: Literal["success"]
    identifier: str = Field(examples=["student"])
    job_id: str = Field(examples=[JOB_ID])
    ignored: list[str] | None = Field(None, description="What of the request does nothing.")


class GroupAnswer(Answer):
    """``initialize_worker``."""

    role: str = Field(examples=["actor"])
    world_size: int = Field(examples=[2])
    already: bool = Field(description="The group was there before.")
    ignored: list[str] = Field(description="What of the request does nothing.")
    paths: dict[str, str] | None = Field(None, description="What relative paths stand for.")


class ModelInfo(BaseModel):
    """A group's model, as its ranks run it."""

    role: str = Field(examples=["actor"])
    model_type: str = Field(examples=["qwen2"])
    parameters: int = Field(examples=[20768])
    vocab_size: int = Field(examples=[64])
    max_position_embeddings: int | None = Field(examples=[32768])
    dtype: str = Field(examples=["float32"])
    compute_dtype: str = Field(examples=["float32"])
    reduce_dtype: str = Field(examples=["float32"])
    device: str = Field(examples=["cpu"])
    world_size: int = Field(examples=[2])
    chunked_log_probs: bool
    chunked_log_probs_reason: str | None = Field(description="Why not.")
    packing: bool
    packing_reason: str | None = Field(description="Why not.")
    micro_batch_mib: float | None = Field(examples=[4096.0])
    optimizer_steps: int = Field(examples=[0])
    weight_version: int = Field(examples=[0])


class ModelAnswer(Answer, ModelInfo):
    """``init_model``."""

    already: bool = Field(description="The model was loaded before.")


class StepAnswer(Answer):
    """``optim_step``."""

    metrics: StepMetrics
    meta_info: StepInfo


class FolderAnswer(Answer):
    """A checkpoint's folder."""

    path: str = Field(examples=["/data/ckpt/step_1"])
    kind: Literal["sharded", "huggingface"]


class ConvertAnswer(FolderAnswer):
    """``convert_checkpoint_to_huggingface``; more of the current weights than of a checkpoint."""

    kind: Literal["huggingface"]
    global_step: int | None = None
    weight_version: int | None = None
    fingerprint: str | None = Field(None, description="Of the weights as they are in the folder.")
    master_fingerprint: str | None = Field(None, description="Of the weights as they train.")


class SaveAnswer(FolderAnswer):
    """``save_checkpoint``: the fingerprints of a Hugging Face folder, the size of a sharded one."""

    global_step: int = Field(examples=[1])
    weight_version: int = Field(examples=[1])
    fingerprint: str | None = Field(None, description="Of the weights as they are in the folder.")
    master_fingerprint: str | None = Field(None, description="Of the weights as they train.")
    nbytes: int | None = Field(None, examples=[336648])
    world_size: int | None = Field(None, examples=[2])


class LoadAnswer(FolderAnswer):
    """``load_checkpoint``."""

    global_step: int | None = Field(None, examples=[1])
    optimizer: str = Field(examples=["restored"])
    rng: str = Field(examples=["restored"])
    dtype: str | None = Field(None, description="Of the weights in a Hugging Face folder.")
