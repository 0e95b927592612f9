"""Reads a worker group's configuration.

:func:`parse_config` turns what a client sent into a :class:`GroupConfig`; :attr:`GroupConfig.ignored` names known keys without effect.
"""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from nexrl_contract.aliases import normalise
from nexrl_contract.errors import ServiceError
from nexrl_contract.operations import ROLES
from nexrl_contract.sections import ActorConfig, Section, ServiceEntry, is_inert, is_not_offered, section_of


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
    config = normalise(config)
    _refuse_unknown(config, ServiceEntry, "")
    try:
        entry = ServiceEntry.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ServiceError("INVALID_CONFIG", f"config key {key}: {first['msg']}", key=key) from None
    _refuse_contradictions(entry.actor)
    _refuse_not_offered(entry, "")
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
        if is_inert(info) or is_not_offered(info):
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


def _refuse_contradictions(actor: ActorConfig) -> None:
    """Keys that are fine each by itself and not together."""
    optim, correction = actor.optim, actor.rollout_correction
    scaled = actor.loss_agg_mode == "seq-mean-token-sum-norm"
    if optim.lr_scheduler != "constant" and (optim.total_training_steps or 0) <= optim.lr_warmup_steps:
        message = f"lr_scheduler {optim.lr_scheduler!r} needs total_training_steps above lr_warmup_steps"
        raise _contradiction("optim.total_training_steps", message)
    if scaled and actor.loss_scale_factor is None:
        raise _contradiction("loss_scale_factor", "loss_agg_mode 'seq-mean-token-sum-norm' needs loss_scale_factor")
    if not scaled and actor.loss_scale_factor is not None:
        raise _contradiction(
            "loss_scale_factor", "only loss_agg_mode 'seq-mean-token-sum-norm' has a loss_scale_factor"
        )
    if actor.policy_loss == "gspo" and actor.loss_agg_mode != "seq-mean-token-mean":
        raise _contradiction("loss_agg_mode", "policy_loss 'gspo' is always seq-mean-token-mean")
    if correction is not None and correction.lower > correction.upper:
        raise _contradiction("rollout_correction.lower", "rollout_correction.lower is above rollout_correction.upper")


def _contradiction(key: str, message: str) -> ServiceError:
    return ServiceError("INVALID_CONFIG", message, key=f"actor.{key}")


def _refuse_not_offered(section: Section, prefix: str) -> None:
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            _refuse_not_offered(value, f"{prefix}{name}.")
        elif value and is_not_offered(info):
            key = f"{prefix}{name}"
            raise ServiceError("INVALID_CONFIG", f"{key} is not offered by this service; leave it false", key=key)


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
        inner = section_of(info)
        if inner is not None and isinstance(value, dict):
            _refuse_unknown(value, inner, f"{prefix}{name}.")


def _inert_keys(config: dict[str, Any], section: type[Section], prefix: str) -> list[str]:
    names: list[str] = []
    for name, value in config.items():
        info = section.model_fields[name]
        inner = section_of(info)
        if is_inert(info):
            names.append(f"{prefix}{name}")
        elif inner is not None and isinstance(value, dict):
            names += _inert_keys(value, inner, f"{prefix}{name}.")
    return names
