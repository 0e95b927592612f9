"""The configuration keys of a worker group: every key that recipes in the field use, with its
default and meaning.

A key of the type ``Ignored`` is known, so that existing recipes are accepted, and does nothing in
this service. One with ``exclude`` says another key's value in another way, and is no setting of its
own. Keys that groups of some roles alone read say which; those of a section hold for all in it.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from nexrl_contract.losses import AggregationMode, DistillationLoss, LossName

Dtype = Literal["float32", "bfloat16", "float64"]
KlEstimator = Literal["k1", "kl", "abs", "k2", "mse", "k3", "low_var_kl", "k1+", "k3+"]
_policy: Any = partial(Field, json_schema_extra={"roles": ("actor",)})
_critic: Any = partial(Field, json_schema_extra={"roles": ("critic",)})
_trained: Any = partial(Field, json_schema_extra={"roles": ("actor", "critic")})
_language: Any = partial(Field, json_schema_extra={"roles": ("actor", "ref", "teacher")})
Ignored = Annotated[Any, Field(json_schema_extra={"inert": True})]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Steps = Annotated[int, Field(ge=0, le=2**31 - 1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def _not_offered(reason: str = "") -> Any:
    """A key whose ``true`` would change what the group does and that nothing here can do: it is
    refused."""
    return Field(default=False, json_schema_extra={"not_offered": reason})


class Given(BaseModel):
    """What a user wrote: unknown keys are refused, and true and false are no numbers."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, field: ValidationInfo) -> Any:
        kinds = _kinds(cls.model_fields[str(field.field_name)].annotation)
        members = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(member, bool) for member in members) and not kinds & {bool, Any}:
            raise PydanticCustomError(
                "bool_for_number", "true and false are not values of this key"
            )
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    return {annotation}.union(
        *(_kinds(inner) for inner in get_args(annotation) if not isinstance(inner, str | int))
    )


class Section(Given):
    """A mapping of the YAML; unknown keys are refused by :func:`parse_config` with the nearest
    known one."""


class ModelConfig(Section):
    """``actor.model``: which weights, and how they are held."""

    path: str = Field(
        min_length=1,
        description="Folder of a Hugging Face model: a causal one, or as the role needs.",
    )
    enable_gradient_checkpointing: bool = _trained(
        default=False, description="Recompute layers in the backward pass."
    )
    use_remove_padding: bool = Field(
        default=False,
        description=(
            "Pack rows into one stream without padding; worker_info says where a family cannot."
        ),
    )
    use_torch_compile: bool = Field(
        default=False, description="Compile every decoder layer with torch.compile."
    )
    lm_head_dtype: Literal["float32"] | None = _language(
        default=None,
        description="Dtype of the output head's product; null takes that of the computation.",
    )
    export_dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = Field(
        default=None,
        description="Dtype of exported weights; null: of each tensor in the folder of path.",
    )
    trust_remote_code: bool = _not_offered(
        "models with code of their own are not run by this service"
    )
    use_liger: Ignored = None
    override_config: Ignored = None
    external_lib: Ignored = None


class MixedPrecisionConfig(Section):
    """``actor.fsdp_config.mixed_precision``: null takes float32 on CPU, bfloat16 parameters and
    float32 reduction on CUDA."""

    param_dtype: Dtype | None = Field(
        default=None, description="Dtype of the forward and backward."
    )
    reduce_dtype: Dtype | None = Field(
        default=None, description="Dtype in which gradients are reduced over ranks."
    )
    buffer_dtype: Ignored = None


class FsdpConfig(Section):
    """``actor.fsdp_config``: dtypes of the sharded model."""

    model_dtype: Literal["float32", "float64"] = Field(
        default="float32", description="Dtype of the master weights."
    )
    mixed_precision: MixedPrecisionConfig = MixedPrecisionConfig()
    gradient_sync: Literal["micro_batch", "mini_batch"] = _trained(
        default="micro_batch",
        description=(
            "When ranks add up gradients; mini_batch communicates less and keeps whole gradients "
            "on every rank."
        ),
    )
    fsdp_size: Ignored = None
    wrap_policy: Ignored = None
    param_offload: bool = _not_offered()
    grad_offload: bool = _not_offered()
    optimizer_offload: bool = _not_offered()


class OptimConfig(Section):
    """``actor.optim``: AdamW and its schedule, counted in optimizer steps."""

    lr: float = Field(default=1e-6, ge=0, description="Peak learning rate.")
    betas: tuple[Decay, Decay] = Field(
        default=(0.9, 0.999), description="Decay of the first and second moment."
    )
    eps: float = Field(default=1e-8, gt=0, description="Added to the root of the second moment.")
    weight_decay: float = Field(
        default=0.01, ge=0, description="Decoupled; of every parameter, but see no_decay."
    )
    no_decay: Literal["norms and biases"] | None = Field(
        default=None,
        description=(
            "Parameters that weight_decay spares, chosen as transformers' Trainer does; null: none."
        ),
    )
    lr_warmup_steps: Steps = Field(
        default=0, description="The first step of a warm-up of n uses lr/n."
    )
    lr_warmup_steps_ratio: float | None = Field(
        default=None,
        ge=0,
        le=1,
        exclude=True,
        description=(
            "Of total_training_steps, rounded down: lr_warmup_steps where that is not given."
        ),
    )
    lr_scheduler: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="Shape after the warm-up."
    )
    total_training_steps: Count | None = Field(
        default=None, description="Where linear and cosine end."
    )
    min_lr_ratio: float = Field(
        default=0.0, ge=0, le=1, description="Where linear and cosine end, as a share of lr."
    )
    warmup_style: Ignored = None


class RolloutConfig(Section):
    """``actor.rollout``: what the trainer's rollouts used."""

    n: Count = Field(
        default=1, description="Responses per prompt; a mini-batch is ppo_mini_batch_size x n rows."
    )
    temperature: float = _language(
        default=1.0, gt=0, description="Used where a batch has no temperature."
    )
    log_prob_micro_batch_size: Ignored = None
    log_prob_micro_batch_size_per_gpu: Ignored = None
    tensor_model_parallel_size: Ignored = None
    use_weight_provider: Ignored = None
    rollout_standalone: Ignored = None
    dtype: Ignored = None


class RefModelConfig(Section):
    """``actor.ref.model``: the weights of ``compute_ref_log_prob``."""

    path: str | None = _language(default=None, description="Null takes actor.model.path.")


class RefConfig(Section):
    """``actor.ref``: the frozen reference."""

    model: RefModelConfig = RefModelConfig()
    log_prob_micro_batch_size: Ignored = None
    fsdp_config: Ignored = None
    ulysses_sequence_parallel_size: Ignored = None


class RolloutCorrectionConfig(Section):
    """``actor.rollout_correction``: weigh the policy term by exp(old - rollout) where the sampler's
    numbers differ."""

    mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = Field(
        description=(
            "Weights of tokens, or their product over a row; clipped to the bounds, or zero "
            "outside them."
        )
    )
    lower: float = Field(default=0.0, ge=0, description="Lower bound of the weight.")
    upper: float = Field(default=2.0, gt=0, description="Upper bound of the weight.")
    drop_rejected: bool = Field(
        default=False,
        description="With *_mask: rejected tokens are not scored. Needs old_log_probs.",
    )

    @property
    def rejects(self) -> bool:
        """Whether there are tokens of no weight at all."""
        return self.mode.endswith("_mask")

    @property
    def drops(self) -> bool:
        """Whether rejected tokens are no longer scored."""
        return self.rejects and self.drop_rejected


class ActorConfig(Section):
    """``actor``: the model and how it is trained."""

    model: ModelConfig
    optim: OptimConfig = _trained(default=OptimConfig())
    fsdp_config: FsdpConfig = FsdpConfig()
    rollout: RolloutConfig = RolloutConfig()
    ref: RefConfig = RefConfig()
    policy_loss: LossName = _policy(default="ppo", description="Also accepted as loss_func_type.")
    loss_agg_mode: AggregationMode = _trained(
        default="token-mean",
        description="How tokens are summed; one denominator for the whole mini-batch.",
    )
    loss_scale_factor: float | None = _trained(
        default=None,
        gt=0,
        description="Divides the loss in seq-mean-token-sum-norm, which needs it.",
    )
    rollout_correction: RolloutCorrectionConfig | None = _policy(
        default=None, description="Needs rollout_log_probs in every batch."
    )
    clip_ratio: float = _policy(
        default=0.2, ge=0, description="The ratio is clipped to 1 - low, 1 + high."
    )
    clip_ratio_low: float | None = _policy(
        default=None,
        ge=0,
        le=1,
        description=(
            "Null takes clip_ratio; with gspo 0.0003 unless clip_ratio is changed; cispo has none."
        ),
    )
    clip_ratio_high: float | None = _policy(
        default=None,
        ge=0,
        description="Null takes clip_ratio; with gspo 0.0004 unless clip_ratio is changed.",
    )
    clip_ratio_c: float | None = _policy(
        default=None, gt=1, description="Dual clip for negative advantages; off by default."
    )
    entropy_coeff: float = _policy(
        default=0.0, description="The loss is lowered by this times the entropy."
    )
    use_kl_loss: bool = _policy(
        default=False, description="Add the KL term, against ref_log_prob or the frozen reference."
    )
    kl_loss_coef: float = _policy(default=0.001, description="Weight of the KL term.")
    kl_loss_type: KlEstimator = _policy(
        default="low_var_kl",
        description="Estimator; kl is k1, mse is k2, low_var_kl is k3. Gradients: training.md.",
    )
    use_bias_correction_kl: bool = _policy(
        default=False,
        description=(
            "Multiply the KL of a token by its ratio exp(lp - old_log_probs), which the gradient "
            "goes through."
        ),
    )
    distillation_loss: DistillationLoss = _policy(
        default="policy_gradient",
        description="From teacher_log_probs, or a KL over the teacher's top k tokens.",
    )
    distillation_student: Literal["current", "old_log_probs", "rollout_log_probs"] = _policy(
        default="current",
        description="Whose log-probabilities the advantage takes; other than current: the batch's.",
    )
    use_distillation_clipping: bool = _policy(
        default=False, description="Clip the ratio of the policy gradient."
    )
    distillation_cliprange: float = _policy(
        default=0.2, ge=0, description="Clipped to 1 - low, 1 + high."
    )
    distillation_cliprange_low: float | None = _policy(
        default=None, ge=0, le=1, description="Null takes distillation_cliprange."
    )
    distillation_cliprange_high: float | None = _policy(
        default=None, ge=0, description="Null takes distillation_cliprange."
    )
    cliprange_value: float = _critic(
        default=0.5,
        gt=0,
        description="Critic: new values are clipped to this around the batch's values.",
    )
    ppo_mini_batch_size: Count | None = Field(
        default=None, description="Prompts per optimizer step; null: all."
    )
    ppo_epochs: int = _trained(
        default=1, ge=1, le=1000, description="Passes over the batch in one update."
    )
    shuffle: bool = Field(
        default=False, description="Draw the rows of a mini-batch at random, by seed."
    )
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="Seeds shuffling and the ranks' generators."
    )
    ppo_micro_batch_size_per_gpu: Count | None = Field(
        default=None,
        description=(
            "Rows per forward of each rank; null: by ppo_micro_batch_size, else as many as fit "
            "into memory."
        ),
    )
    ppo_micro_batch_size: Count | None = Field(
        default=None,
        exclude=True,
        description=(
            "Rows per forward of all ranks together: each takes this / world size, rounded down, "
            "at least 1."
        ),
    )
    use_dynamic_bsz: bool = Field(
        default=False,
        description=(
            "Micro-batches by ppo_max_token_len_per_gpu, whatever ppo_micro_batch_size says."
        ),
    )
    ppo_max_token_len_per_gpu: Count = Field(
        default=16384, description="That budget; a longer row stands alone."
    )
    grad_clip: float | None = _trained(
        default=1.0,
        gt=0,
        description="Largest gradient norm (L2, all parameters); null: no clipping.",
    )
    ulysses_sequence_parallel_size: Ignored = None
    use_ring_sequence_parallel: Ignored = None
    do_old_log_prob_compute: Ignored = None
    do_old_student_log_prob_compute: Ignored = None
    train_token_start_pct: Ignored = None
    train_token_end_pct: Ignored = None
    advantage_start_pct: Ignored = None
    advantage_end_pct: Ignored = None
    entropy_start_pct: Ignored = None
    entropy_end_pct: Ignored = None
    distillation_epochs: Ignored = None
    checkpoint_manager: Ignored = None
    enable_memory_tracing: Ignored = None
    debug: Ignored = None


class ResourceConfig(Section):
    """``resource``: how many ranks."""

    world_size: Count | None = Field(
        default=None, description="Ranks, where initialize_worker names no world_size."
    )
    gpus_per_pod: Ignored = None
    memory_per_gpu: Ignored = None


class ServiceEntry(Section):
    """One entry of ``service.train_service``; the same mapping is a client's ``config_dict``."""

    actor: ActorConfig
    resource: ResourceConfig = ResourceConfig()
    identifier: Ignored = None
    role: Ignored = None
    backend: Ignored = None
    url: Ignored = None


def is_inert(info: FieldInfo) -> bool:
    """Whether a field is known and does nothing."""
    return "inert" in _marks(info)


def reason_against(info: FieldInfo) -> str | None:
    """Why ``true`` is refused for a field; None where it is not."""
    reason = _marks(info).get("not_offered")
    return reason if reason is None else str(reason or "not offered by this service")


def roles_of(info: FieldInfo) -> tuple[str, ...]:
    """The roles of the groups that read a field; empty where it does not say."""
    return tuple(_marks(info).get("roles", ()))


def _marks(info: FieldInfo) -> dict[str, Any]:
    return info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}


def means_null(info: FieldInfo) -> bool:
    """Whether null says something that leaving the key out does not."""
    return type(None) in get_args(info.annotation) and info.default is not None


def section_of(info: FieldInfo) -> type[Section] | None:
    """The section that a field holds, if it holds one."""
    for kind in (info.annotation, *get_args(info.annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None
