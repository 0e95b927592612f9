"""Which of the given keys do nothing: because nothing here reads them, or because the group's role
or loss does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nexrl_contract.aliases import ALIASES
from nexrl_contract.losses import LOSSES
from nexrl_contract.operations import FORWARD_ROLES
from nexrl_contract.sections import (
    ActorConfig,
    OptimConfig,
    Section,
    ServiceEntry,
    is_inert,
    section_of,
)

_ROUTING = ("identifier", "role", "backend", "url")

_MICRO_ROWS = ("ppo_micro_batch_size_per_gpu", "ppo_micro_batch_size")  # the first one given counts

_POLICY = (
    "policy_loss",
    "clip_ratio",
    "clip_ratio_low",
    "clip_ratio_high",
    "clip_ratio_c",
    "entropy_coeff",
    "use_kl_loss",
    "kl_loss_coef",
    "kl_loss_type",
    "use_bias_correction_kl",
    "rollout_correction",
    "distillation_loss",
    "distillation_student",
    "use_distillation_clipping",
    "distillation_cliprange",
    "distillation_cliprange_low",
    "distillation_cliprange_high",
)
_SCORING = (
    *_POLICY,
    "cliprange_value",
    "loss_agg_mode",
    "loss_scale_factor",
    "optim",
    "grad_clip",
    "ppo_epochs",
    "fsdp_config.gradient_sync",
    "model.enable_gradient_checkpointing",
)
_OF_LANGUAGE_MODELS = ("rollout.temperature", "ref.model.path", "model.lm_head_dtype")

WITHOUT_EFFECT: Mapping[str, tuple[str, ...]] = {
    "actor": ("cliprange_value",),
    "critic": (*_POLICY, *_OF_LANGUAGE_MODELS),
    "ref": _SCORING,
    "teacher": _SCORING,
    "reward": (*_SCORING, *_OF_LANGUAGE_MODELS),
}
"""For each role the keys of ``actor``, or the sections, that nothing of it reads."""


def keys_without_effect(config: Mapping[str, Any], entry: ServiceEntry, role: str) -> list[str]:
    """Dotted names of those keys of ``config``, read as ``entry``, that do nothing in a group of
    this role.

    A key that repeats its default is not named for its role: leaving it out would change nothing
    either.
    """
    inert = [name for name in _inert(config, ServiceEntry, "") if name not in _ROUTING]
    unread = [
        f"actor.{given}"
        for given, key in _changed(config["actor"], entry.actor, "")
        if _covered(key, role)
    ]
    return [*inert, *unread, *_superseded(entry.actor, role)]


def _covered(key: str, role: str) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in WITHOUT_EFFECT[role])


def _inert(config: Mapping[str, Any], section: type[Section], prefix: str) -> Iterator[str]:
    for name, value in config.items():
        info = section.model_fields.get(name)
        if info is None:  # another name of a key that has an effect
            continue
        inner = section_of(info)
        if is_inert(info):
            yield f"{prefix}{name}"
        elif inner is not None and isinstance(value, Mapping):
            yield from _inert(value, inner, f"{prefix}{name}.")


def _changed(config: Mapping[str, Any], section: Section, prefix: str) -> Iterator[tuple[str, str]]:
    """Each given key whose value is not the default's, as it was given and by our name."""
    for given, value in config.items():
        name = given if prefix else ALIASES.get(given, given)
        info = type(section).model_fields[name]
        read = getattr(section, name)
        if isinstance(read, Section) and info.default is not None:
            yield from _changed(value, read, f"{prefix}{name}.")
        elif not is_inert(info) and read != info.default:
            yield f"{prefix}{given}", f"{prefix}{name}"


def _superseded(actor: ActorConfig, role: str) -> Iterator[str]:
    """Keys that another one has replaced, or has no use for."""
    if (
        role == "actor"
        and actor.clip_ratio_c is not None
        and not LOSSES[actor.policy_loss].dual_clip
    ):
        yield "actor.clip_ratio_c"
    if (
        role == "actor"
        and actor.use_bias_correction_kl
        and not (actor.use_kl_loss and actor.kl_loss_coef)
    ):
        yield "actor.use_bias_correction_kl"
    correction = actor.rollout_correction
    if (
        role == "actor"
        and correction is not None
        and correction.drop_rejected
        and not correction.drops
    ):
        yield "actor.rollout_correction.drop_rejected"
    if (
        role not in FORWARD_ROLES
        and actor.optim.no_decay is not None
        and actor.optim.weight_decay == 0.0
    ):
        yield "actor.optim.no_decay"
    rows = [name for name in _MICRO_ROWS if getattr(actor, name) is not None]
    yield from (f"actor.{name}" for name in (rows if actor.use_dynamic_bsz else rows[1:]))
    if actor.optim.lr_warmup_steps_ratio and not takes_warmup_ratio(actor.optim):
        yield "actor.optim.lr_warmup_steps_ratio"


def takes_warmup_ratio(optim: OptimConfig) -> bool:
    """Whether ``lr_warmup_steps_ratio`` says the steps of the warm-up: a total is known, and
    nothing else says them."""
    given = "lr_warmup_steps" in optim.model_fields_set
    return (
        bool(optim.lr_warmup_steps_ratio) and optim.total_training_steps is not None and not given
    )
