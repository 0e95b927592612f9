"""Reads a worker group's configuration.

:func:`parse_config` turns what a client sent into a :class:`GroupConfig`;
:attr:`GroupConfig.ignored` names known keys without effect.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from nexrl_contract.errors import ServiceError, literals_of, nearest
from nexrl_contract.losses import LOSSES
from nexrl_contract.operations import ROLES
from nexrl_contract.recipe_keys import (
    ALIASES,
    given_keys,
    ignored_keys,
    normalise,
    takes_warmup_ratio,
)
from nexrl_contract.sections import (
    ActorConfig,
    Section,
    ServiceEntry,
    is_inert,
    means_null,
    reason_against,
    section_of,
)


class GroupConfig(BaseModel):
    """A checked configuration and the names of the known keys in it that do nothing here."""

    model_config = ConfigDict(frozen=True)

    entry: ServiceEntry
    ignored: tuple[str, ...]

    def settings(self, world_size: int = 1) -> dict[str, Any]:
        """What makes two groups equal: the effective ``actor`` keys, JSON-able, defaults filled in.

        Of ``world_size`` ranks each takes its share of ``ppo_micro_batch_size``, where it has no
        size of its own.
        """
        actor = self.entry.actor
        if actor.ppo_micro_batch_size_per_gpu is None and actor.ppo_micro_batch_size is not None:
            share = max(1, actor.ppo_micro_batch_size // world_size)
            actor = actor.model_copy(update={"ppo_micro_batch_size_per_gpu": share})
        return effective(actor)


def parse_config(config: dict[str, Any], role: str = "actor") -> GroupConfig:
    """Check a ``config_dict`` for a group of this role, one of ROLES.

    Raises ``INVALID_CONFIG`` naming the key (and the nearest known one, if it is unknown).
    """
    _refuse_interpolation(config)
    config = _without_nulls(config, ServiceEntry)
    ours, dropped = normalise(config, role)
    _refuse_unknown(ours)
    try:
        entry = ServiceEntry.model_validate(ours)
    except ValidationError as error:
        raise _refused_value(error) from None
    ignored = [*dropped, *ignored_keys(config, entry, role)]
    entry = entry.model_copy(update={"actor": _with_warmup(entry.actor)})
    for key, message in _contradictions(entry.actor, role):
        raise ServiceError("INVALID_CONFIG", message, key=f"actor.{key}")
    _refuse_not_offered(entry, "")
    return GroupConfig(entry=entry, ignored=tuple(dict.fromkeys(ignored)))


def _refused_value(error: ValidationError) -> ServiceError:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    close = nearest(str(first["input"])[:100], literals_of(first))
    hint = f"; did you mean {close}?" if close else ""
    return ServiceError(
        "INVALID_CONFIG", f"config key {key}: {first['msg']}{hint}", key=key, nearest=close
    )


def check_role(role: Any) -> str:
    """``role`` if a group can have it; raises ``INVALID_ARGUMENT`` otherwise."""
    if not isinstance(role, str) or role not in ROLES:
        raise ServiceError(
            "INVALID_ARGUMENT",
            f"role {str(role)[:100]!r} is not one of {', '.join(ROLES)}",
            key="role",
            nearest=nearest(str(role)[:100], ROLES),
        )
    return role


def effective(section: Section) -> dict[str, Any]:
    """The keys of a section that have an effect, recursively, as JSON values."""
    values: dict[str, Any] = {}
    for name, info in type(section).model_fields.items():
        if is_inert(info) or reason_against(info) or info.exclude:
            continue
        value = getattr(section, name)
        if isinstance(value, Section):
            value = effective(value)
        values[name] = list(value) if isinstance(value, tuple) else value
    return values


def completed(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that an older version kept, with the keys it did not know at their defaults; as they
    are if unreadable."""
    try:
        return effective(ActorConfig.model_validate(settings))
    except ValidationError:
        return settings


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


def _with_warmup(actor: ActorConfig) -> ActorConfig:
    optim = actor.optim
    if not takes_warmup_ratio(optim):
        return actor
    steps = int((optim.lr_warmup_steps_ratio or 0.0) * (optim.total_training_steps or 0))
    return actor.model_copy(update={"optim": optim.model_copy(update={"lr_warmup_steps": steps})})


def _contradictions(actor: ActorConfig, role: str) -> Iterator[tuple[str, str]]:
    """Keys of ``actor`` that are fine each by itself and not together, each with a message."""
    optim, correction, norm = actor.optim, actor.rollout_correction, "seq-mean-token-sum-norm"
    total, warmup = optim.total_training_steps or 0, optim.lr_warmup_steps
    if optim.lr_scheduler != "constant" and total <= warmup:
        needs = "needs total_training_steps above lr_warmup_steps"
        yield "optim.total_training_steps", f"lr_scheduler {optim.lr_scheduler!r} {needs}"
    if role == "actor":
        yield from _unused_by_loss(actor)
    if actor.loss_agg_mode == norm and actor.loss_scale_factor is None:
        yield "loss_scale_factor", f"loss_agg_mode {norm!r} needs loss_scale_factor"
    if actor.loss_agg_mode != norm and actor.loss_scale_factor is not None:
        yield "loss_scale_factor", f"only loss_agg_mode {norm!r} has a loss_scale_factor"
    if correction is not None and correction.lower > correction.upper:
        key = "rollout_correction.lower"
        yield key, f"{key} is above rollout_correction.upper"
    # float64 is for exact comparisons; computing such weights in less would not be one.
    for name in ("param_dtype", "reduce_dtype"):
        value = getattr(actor.fsdp_config.mixed_precision, name)
        if actor.fsdp_config.model_dtype == "float64" and value not in (None, "float64"):
            key = f"fsdp_config.mixed_precision.{name}"
            yield key, f"{key} {value!r} contradicts model_dtype 'float64'; leave it out"


def _unused_by_loss(actor: ActorConfig) -> Iterator[tuple[str, str]]:
    """Keys that the group's loss has no use for, where that would go unnoticed."""
    loss = LOSSES[actor.policy_loss]
    left_out = loss.loss_agg_mode or ActorConfig.model_fields["loss_agg_mode"].default
    if loss.aggregation is not None and actor.loss_agg_mode != left_out:
        always = f"is always {loss.aggregation}; leave loss_agg_mode out"
        yield "loss_agg_mode", f"policy_loss {loss.name!r} {always}"
    if not loss.advantages and actor.rollout_correction is not None:
        without = "has no ratio to correct; leave rollout_correction out"
        yield "rollout_correction", f"policy_loss {loss.name!r} {without}"


def _refuse_not_offered(section: Section, prefix: str) -> None:
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            _refuse_not_offered(value, f"{prefix}{name}.")
        elif value and (reason := reason_against(info)):
            message = f"config key {prefix}{name}: {reason}; leave it false"
            raise ServiceError("INVALID_CONFIG", message, key=f"{prefix}{name}")


def _refuse_interpolation(config: dict[str, Any]) -> None:
    # No recursion: how deep it goes is the sender's choice.
    pending: list[tuple[str, Any]] = [("", config)]
    while pending:
        path, value = pending.pop()
        if isinstance(value, dict):
            prefix = f"{path}." if path else ""
            pending += [(f"{prefix}{name}", inner) for name, inner in value.items()]
        elif isinstance(value, list):
            pending += [(f"{path}[{index}]", inner) for index, inner in enumerate(value)]
        elif isinstance(value, str) and "${" in value:
            what = f"interpolation {value!r} is not resolved here; write the value"
            raise ServiceError("INVALID_CONFIG", f"config key {path}: {what}", key=path)


def _nearest_key(name: str, section: type[Section], prefix: str) -> str | None:
    """The dotted name of what was meant: that name in another section, else what resembles it, here
    before elsewhere."""
    elsewhere: dict[str, str] = {}
    for dotted in _keys_with_effect(ServiceEntry, ""):
        elsewhere.setdefault(dotted.rpartition(".")[2], dotted)
    if name in elsewhere:
        return elsewhere[name]
    close = nearest(name, section.model_fields)
    if close is not None:
        return f"{prefix}{close}"
    close = nearest(name, elsewhere)
    return elsewhere[close] if close is not None else None


def _keys_with_effect(section: type[Section], prefix: str) -> Iterator[str]:
    for name, info in section.model_fields.items():
        if is_inert(info) or reason_against(info):
            continue
        yield f"{prefix}{name}"
        inner = section_of(info)
        if inner is not None:
            yield from _keys_with_effect(inner, f"{prefix}{name}.")


def _without_nulls(config: dict[str, Any], section: type[Section]) -> dict[str, Any]:
    """A YAML key without a value is as if it were not there; null stays where it says something of
    its own."""
    kept: dict[str, Any] = {}
    for name, value in config.items():
        info = section.model_fields.get(name)
        inner = section_of(info) if info is not None else None
        if inner is not None and isinstance(value, dict):
            kept[name] = _without_nulls(value, inner)
        elif value is not None or (name not in ALIASES if info is None else means_null(info)):
            kept[name] = value
    return kept


def _refuse_unknown(config: dict[str, Any]) -> None:
    for prefix, name, info, section in given_keys(config, ServiceEntry):
        if info is None:
            close = _nearest_key(name, section, prefix)
            hint = f"; did you mean {close}?" if close else ""
            message = f"unknown config key {prefix}{name}{hint}"
            raise ServiceError("INVALID_CONFIG", message, key=f"{prefix}{name}", nearest=close)
