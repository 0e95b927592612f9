"""The configuration of a worker group: every key that recipes in the field use, with its default, and what has no effect here.

:func:`parse_config` turns what a client sent into a :class:`GroupConfig`; :attr:`GroupConfig.ignored` names known keys without effect.
A key marked :func:`_inert` is known, so that existing recipes are accepted, and does nothing in this service.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nexrl_contract.errors import ServiceError
from nexrl_contract.operations import ROLES

Dtype = Literal["float32", "bfloat16", "float64"]
_DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp64": "float64"}
_INERT: Any = {"inert": True}
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Steps = Annotated[int, Field(ge=0, le=2**31 - 1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def _inert() -> Any:
    return Field(default=None, json_schema_extra=_INERT)


class Section(BaseModel):
    """A mapping of the YAML; unknown keys are refused by :func:`parse_config` with the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class ModelConfig(Section):
    """``actor.model``: which weights, and how they are held."""

    path: str = Field(min_length=1, description="Folder of a Hugging Face causal language model.")
    enable_gradient_checkpointing: bool = Field(default=False, description="Recompute layers in the backward pass.")
    use_remove_padding: Any = _inert()
    trust_remote_code: Any = _inert()
    use_liger: Any = _inert()
    override_config: Any = _inert()
    external_lib: Any = _inert()


class MixedPrecisionConfig(Section):
    """``actor.fsdp_config.mixed_precision``: null takes float32 on CPU, bfloat16 parameters and float32 reduction on CUDA."""

    param_dtype: Dtype | None = Field(default=None, description="Dtype of the forward and backward.")
    reduce_dtype: Dtype | None = Field(default=None, description="Dtype in which gradients are reduced over ranks.")
    buffer_dtype: Any = _inert()


class FsdpConfig(Section):
    """``actor.fsdp_config``: dtypes of the sharded model."""

    model_dtype: Literal["float32", "float64"] = Field(default="float32", description="Dtype of the master weights.")
    mixed_precision: MixedPrecisionConfig = MixedPrecisionConfig()
    fsdp_size: Any = _inert()
    wrap_policy: Any = _inert()
    param_offload: Any = _inert()
    grad_offload: Any = _inert()
    optimizer_offload: Any = _inert()


class OptimConfig(Section):
    """``actor.optim``: AdamW and its schedule, counted in optimizer steps."""

    lr: float = Field(default=1e-6, ge=0, description="Peak learning rate.")
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.999), description="Decay of the first and second moment.")
    eps: float = Field(default=1e-8, gt=0, description="Added to the root of the second moment.")
    weight_decay: float = Field(default=0.01, ge=0, description="Decoupled; applied to every parameter.")
    lr_warmup_steps: Steps = Field(default=0, description="The first step of a warm-up of n uses lr/n.")
    lr_scheduler: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="Shape after the warm-up."
    )
    total_training_steps: Count | None = Field(default=None, description="Where linear and cosine end.")
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1, description="Where linear and cosine end, as a share of lr.")
    lr_warmup_steps_ratio: Any = _inert()
    warmup_style: Any = _inert()


class RolloutConfig(Section):
    """``actor.rollout``: what the trainer's rollouts used."""

    n: Count = Field(default=1, description="Responses per prompt; a mini-batch is ppo_mini_batch_size x n rows.")
    temperature: float = Field(default=1.0, gt=0, description="Used where a batch's metadata has no temperature.")
    log_prob_micro_batch_size: Any = _inert()
    log_prob_micro_batch_size_per_gpu: Any = _inert()
    tensor_model_parallel_size: Any = _inert()
    use_weight_provider: Any = _inert()
    rollout_standalone: Any = _inert()
    dtype: Any = _inert()


class RefModelConfig(Section):
    """``actor.ref.model``: the weights of ``compute_ref_log_prob``."""

    path: str | None = Field(default=None, description="Null takes actor.model.path.")


class RefConfig(Section):
    """``actor.ref``: the frozen reference."""

    model: RefModelConfig = RefModelConfig()
    log_prob_micro_batch_size: Any = _inert()
    fsdp_config: Any = _inert()
    ulysses_sequence_parallel_size: Any = _inert()


class ActorConfig(Section):
    """``actor``: the model and how it is trained."""

    model: ModelConfig
    optim: OptimConfig = OptimConfig()
    fsdp_config: FsdpConfig = FsdpConfig()
    rollout: RolloutConfig = RolloutConfig()
    ref: RefConfig = RefConfig()
    policy_loss: Literal["ppo", "grpo", "importance_sampling", "reinforce", "cross_entropy"] = Field(
        default="ppo", description="Also accepted as loss_func_type."
    )
    loss_agg_mode: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"] = Field(
        default="token-mean", description="How tokens are summed; the denominator is that of the whole mini-batch."
    )
    clip_ratio: float = Field(default=0.2, ge=0, description="The ratio is clipped to 1 - low, 1 + high.")
    clip_ratio_low: float | None = Field(default=None, ge=0, le=1, description="Null takes clip_ratio.")
    clip_ratio_high: float | None = Field(default=None, ge=0, description="Null takes clip_ratio.")
    clip_ratio_c: float | None = Field(
        default=None, gt=1, description="Dual clip for negative advantages; off by default."
    )
    entropy_coeff: float = Field(default=0.0, description="The loss is lowered by this times the entropy.")
    use_kl_loss: bool = Field(
        default=False, description="Add the KL term, against ref_log_prob or the frozen reference."
    )
    kl_loss_coef: float = Field(default=0.001, description="Weight of the KL term.")
    kl_loss_type: Literal["k1", "kl", "abs", "k2", "mse", "k3", "low_var_kl"] = Field(
        default="low_var_kl", description="Estimator; kl is k1, mse is k2, low_var_kl is k3."
    )
    ppo_mini_batch_size: Count | None = Field(default=None, description="Prompts per optimizer step; null: all.")
    ppo_epochs: int = Field(default=1, ge=1, le=1000, description="Passes over the batch in one update.")
    shuffle: bool = Field(default=False, description="Draw the rows of a mini-batch at random, by seed.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seeds shuffling and the ranks' generators.")
    ppo_micro_batch_size_per_gpu: Count | None = Field(default=None, description="Rows per forward; null: all.")
    use_dynamic_bsz: bool = Field(default=False, description="Micro-batches by token budget instead of rows.")
    ppo_max_token_len_per_gpu: Count = Field(default=16384, description="That budget; a longer row stands alone.")
    grad_clip: float = Field(default=1.0, gt=0, description="Largest gradient norm (L2, all parameters).")
    ppo_micro_batch_size: Any = _inert()
    ulysses_sequence_parallel_size: Any = _inert()
    use_ring_sequence_parallel: Any = _inert()
    do_old_log_prob_compute: Any = _inert()
    use_distillation_clipping: Any = _inert()
    distillation_cliprange: Any = _inert()
    distillation_cliprange_low: Any = _inert()
    distillation_cliprange_high: Any = _inert()
    do_old_student_log_prob_compute: Any = _inert()
    train_token_start_pct: Any = _inert()
    train_token_end_pct: Any = _inert()
    advantage_start_pct: Any = _inert()
    advantage_end_pct: Any = _inert()
    entropy_start_pct: Any = _inert()
    entropy_end_pct: Any = _inert()
    distillation_epochs: Any = _inert()
    checkpoint_manager: Any = _inert()
    enable_memory_tracing: Any = _inert()
    debug: Any = _inert()


class ResourceConfig(Section):
    """``resource``: how many ranks."""

    world_size: Count | None = Field(default=None, description="Ranks, where initialize_worker names no world_size.")
    gpus_per_pod: Any = _inert()
    memory_per_gpu: Any = _inert()


class ServiceEntry(Section):
    """One entry of ``service.train_service``; the same mapping is a client's ``config_dict``."""

    actor: ActorConfig
    resource: ResourceConfig = ResourceConfig()
    identifier: Any = _inert()
    role: Any = _inert()
    backend: Any = _inert()
    url: Any = _inert()


class GroupConfig(BaseModel):
    """A checked configuration and the names of the known keys in it that do nothing here."""

    model_config = ConfigDict(frozen=True)

    entry: ServiceEntry
    ignored: tuple[str, ...]

    def settings(self) -> dict[str, Any]:
        """What makes two groups equal: the effective ``actor`` keys, JSON-able, defaults filled in."""
        return effective(self.entry.actor)


_ROUTING = ("identifier", "role", "backend", "url")


def parse_config(config: dict[str, Any]) -> GroupConfig:
    """Check a ``config_dict``; raises ``INVALID_CONFIG`` naming the key (and the nearest known one, if it is unknown)."""
    _refuse_interpolation(config)
    config = _normalise(config)
    _refuse_unknown(config, ServiceEntry, "")
    try:
        entry = ServiceEntry.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ServiceError("INVALID_CONFIG", f"config key {key}: {first['msg']}", key=key) from None
    actor = entry.actor
    optim = actor.optim
    if optim.lr_scheduler != "constant" and (optim.total_training_steps or 0) <= optim.lr_warmup_steps:
        message = f"actor.optim.lr_scheduler {optim.lr_scheduler!r} needs total_training_steps above lr_warmup_steps"
        raise ServiceError("INVALID_CONFIG", message, key="actor.optim.total_training_steps")
    ignored = [name for name in _inert_keys(config, ServiceEntry, "") if name not in _ROUTING]
    return GroupConfig(entry=entry, ignored=tuple(ignored))


def check_role(role: str) -> str:
    """``role`` if a group can have it; raises ``INVALID_ARGUMENT`` otherwise."""
    if role not in ROLES:
        raise ServiceError(
            "INVALID_ARGUMENT",
            f"role {role!r} is not one of {', '.join(ROLES)}",
            key="role",
            nearest=nearest(role, ROLES),
        )
    return role


def effective(section: Section) -> dict[str, Any]:
    """The keys of a section that have an effect, recursively, as JSON values."""
    values: dict[str, Any] = {}
    for name, info in type(section).model_fields.items():
        if _is_inert(info):
            continue
        value = getattr(section, name)
        values[name] = (
            effective(value) if isinstance(value, Section) else list(value) if isinstance(value, tuple) else value
        )
    return values


def differing_keys(left: dict[str, Any], right: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the keys in which two nested mappings differ, sorted."""
    names: list[str] = []
    for name in sorted(left.keys() | right.keys()):
        one, two = left.get(name), right.get(name)
        if isinstance(one, dict) and isinstance(two, dict):
            names += differing_keys(one, two, f"{prefix}{name}.")
        elif one != two:
            names.append(f"{prefix}{name}")
    return names


def nearest(word: str, known: Any) -> str | None:
    """The known word that ``word`` abbreviates to (``learning_rate``: ``lr``) or resembles most, None when nothing is close."""
    words = [str(name) for name in known]
    initials = "".join(part[:1] for part in word.split("_"))
    if initials in words:
        return initials
    matches = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return matches[0] if matches else None


def _refuse_interpolation(config: dict[str, Any]) -> None:
    pending: list[tuple[str, Any]] = [("", config)]  # no recursion: the depth is the sender's choice
    while pending:
        path, value = pending.pop()
        if isinstance(value, dict):
            pending += [(f"{path}.{name}" if path else str(name), inner) for name, inner in value.items()]
        elif isinstance(value, list):
            pending += [(f"{path}[{index}]", inner) for index, inner in enumerate(value)]
        elif isinstance(value, str) and "${" in value:
            message = f"config key {path}: interpolation {value!r} is not resolved here; write the value"
            raise ServiceError("INVALID_CONFIG", message, key=path)


def _normalise(config: dict[str, Any]) -> dict[str, Any]:
    """Aliases of the field: ``loss_func_type`` for ``policy_loss``, ``kl`` names, short dtype names."""
    actor = config.get("actor")
    if not isinstance(actor, dict):
        return config
    actor = dict(actor)
    if "loss_func_type" in actor:
        alias = actor.pop("loss_func_type")
        if actor.setdefault("policy_loss", alias) != alias:
            raise ServiceError(
                "INVALID_CONFIG",
                "actor.loss_func_type and actor.policy_loss differ; keep one",
                key="actor.loss_func_type",
            )
    fsdp = actor.get("fsdp_config")
    if isinstance(fsdp, dict):
        actor["fsdp_config"] = _short_dtypes(fsdp)
    return {**config, "actor": actor}


def _short_dtypes(section: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _short_dtypes(value)
        if isinstance(value, dict)
        else _DTYPE_NAMES.get(value, value)
        if name.endswith("dtype") and isinstance(value, str)
        else value
        for name, value in section.items()
    }


def _refuse_unknown(config: dict[str, Any], section: type[Section], prefix: str) -> None:
    for name, value in config.items():
        info = section.model_fields.get(name)
        if info is None:
            close = nearest(str(name), section.model_fields)
            hint = f"; did you mean {prefix}{close}?" if close else ""
            raise ServiceError(
                "INVALID_CONFIG",
                f"unknown config key {prefix}{name}{hint}",
                key=f"{prefix}{name}",
                nearest=f"{prefix}{close}" if close else None,
            )
        inner = _section_of(info)
        if inner is not None and isinstance(value, dict):
            _refuse_unknown(value, inner, f"{prefix}{name}.")


def _inert_keys(config: dict[str, Any], section: type[Section], prefix: str) -> list[str]:
    names: list[str] = []
    for name, value in config.items():
        info = section.model_fields[name]
        inner = _section_of(info)
        if _is_inert(info):
            names.append(f"{prefix}{name}")
        elif inner is not None and isinstance(value, dict):
            names += _inert_keys(value, inner, f"{prefix}{name}.")
    return names


def _is_inert(info: Any) -> bool:
    return bool(info.json_schema_extra == _INERT)


def _section_of(info: Any) -> type[Section] | None:
    for kind in (info.annotation, *get_args(info.annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None
