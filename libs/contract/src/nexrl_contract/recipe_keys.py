"""What the keys of recipes in the field mean here: other names and short forms, and keys that do
nothing because nothing here reads them, or because the group's role or loss does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic.fields import FieldInfo

from nexrl_contract.errors import ServiceError
from nexrl_contract.losses import DATED_LOSSES, LOSSES
from nexrl_contract.operations import FORWARD_ROLES
from nexrl_contract.sections import (
    ActorConfig,
    OptimConfig,
    Section,
    ServiceEntry,
    is_inert,
    roles_of,
    section_of,
)

ALIASES = {"loss_func_type": "policy_loss"}
"""Other names of keys of ``actor``."""
_DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp64": "float64"}
_CLIP_DEFAULT = ActorConfig.model_fields["clip_ratio"].default
_ROUTING = ("identifier", "role", "backend", "url")
_MICRO_ROWS = ("ppo_micro_batch_size_per_gpu", "ppo_micro_batch_size")  # the first one given counts


def normalise(config: dict[str, Any], role: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """``loss_func_type`` and its values, short dtype names, and what a loss fixes by itself;
    ``config`` stays as it is.

    Also the dotted names of the keys that the loss's old name makes mean nothing. Raises
    INVALID_CONFIG for a loss whose meaning cannot be had here.
    """
    if not isinstance(config.get("actor"), dict):
        return config, ()
    actor, dropped = _own_loss(dict(config["actor"]))
    loss = LOSSES.get(str(actor.get("policy_loss"))) if role == "actor" else None
    if loss is not None and loss.loss_agg_mode is not None:
        actor.setdefault("loss_agg_mode", loss.loss_agg_mode)
    changed = actor.get("clip_ratio") not in (None, _CLIP_DEFAULT)  # recipes spell the default out
    if loss is not None and loss.clip is not None and changed:
        bounds = [name for name in ("clip_ratio_low", "clip_ratio_high") if actor.get(name) is None]
        actor |= dict.fromkeys(bounds, actor["clip_ratio"])
    optim = actor.get("optim")
    # 0 is how NexRL 1.x says that the total is not known.
    if isinstance(optim, dict) and optim.get("total_training_steps") == 0:
        actor["optim"] = {**optim, "total_training_steps": None}
    fsdp = actor.get("fsdp_config")
    if isinstance(fsdp, dict):
        actor["fsdp_config"] = _short_dtypes(fsdp)
    return {**config, "actor": actor}, dropped


def _own_loss(actor: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """``actor`` with our name of its loss, and the names of the keys that the given name drops."""
    key = "loss_func_type" if "loss_func_type" in actor else "policy_loss"
    if key == "loss_func_type":
        alias = actor.pop(key)
        if actor.setdefault("policy_loss", alias) != alias:
            named = actor["policy_loss"]
            raise _refused(key, f"{key} {alias!r} and policy_loss {named!r} differ; keep one")
    name = actor.get("policy_loss")
    if not isinstance(name, str) or not name.startswith("NX_"):
        return actor, ()
    if name not in DATED_LOSSES:
        message = "has no counterpart here; use ppo, gspo, cispo or importance_sampling"
        raise _refused(key, f"{key} {name!r} {message}")
    dated = DATED_LOSSES[name]
    if dated.symmetric:
        _refuse_asymmetry(actor, f"{key} {name}")
    if dated.dual_clip is not None:
        return {"clip_ratio_c": dated.dual_clip, **actor, "policy_loss": "ppo"}, ()
    given = actor.pop("clip_ratio_c", None) is not None
    return {**actor, "policy_loss": "ppo"}, ("actor.clip_ratio_c",) if given else ()


def _refuse_asymmetry(actor: dict[str, Any], loss: str) -> None:
    for bound in ("clip_ratio_low", "clip_ratio_high"):
        if actor.get(bound) not in (None, actor.get("clip_ratio")):
            raise _refused(
                bound, f"{loss} clips by clip_ratio alone; use ppo, or leave {bound} out"
            )
    if actor.get("loss_agg_mode", "token-mean") != "token-mean":
        raise _refused("loss_agg_mode", f"{loss} is always token-mean; use ppo for other modes")


def _refused(key: str, message: str) -> ServiceError:
    return ServiceError("INVALID_CONFIG", message, key=f"actor.{key}")


def _short_dtypes(section: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _short_dtypes(value)
        if isinstance(value, dict)
        else _DTYPE_NAMES.get(value, value)
        if name.endswith("dtype") and isinstance(value, str)
        else value
        for name, value in section.items()
    }


def ignored_keys(config: Mapping[str, Any], entry: ServiceEntry, role: str) -> list[str]:
    """Dotted names of those keys of ``config``, read as ``entry``, that do nothing in a group of
    this role.

    A key that repeats its default is not named for its role: leaving it out would change nothing
    either.
    """
    inert = [
        f"{prefix}{name}"
        for prefix, name, info, _ in given_keys(config, ServiceEntry)
        if info is not None and is_inert(info) and (prefix or name not in _ROUTING)
    ]
    unread = _unread(config["actor"], entry.actor, role, "", ())
    return [*inert, *(f"actor.{name}" for name in (*unread, *_superseded(entry.actor, role)))]


def given_keys(
    config: Mapping[str, Any], section: type[Section], prefix: str = ""
) -> Iterator[tuple[str, str, FieldInfo | None, type[Section]]]:
    """What stands before a key of ``config`` and its name, its field (None where there is none) and
    its section; a section's own key comes before those in it."""
    for name, value in config.items():
        info = section.model_fields.get(name)
        yield prefix, str(name), info, section
        inner = section_of(info) if info is not None else None
        if inner is not None and isinstance(value, Mapping):
            yield from given_keys(value, inner, f"{prefix}{name}.")


def _unread(
    config: Mapping[str, Any], section: Section, role: str, prefix: str, outer: tuple[str, ...]
) -> Iterator[str]:
    """Each given key whose value is not the default's and that groups of other roles alone read."""
    for given, value in config.items():
        name = given if prefix else ALIASES.get(given, given)
        info = type(section).model_fields[name]
        read, roles = getattr(section, name), roles_of(info) or outer
        if isinstance(read, Section) and info.default is not None:
            yield from _unread(value, read, role, f"{prefix}{name}.", roles)
        elif roles and role not in roles and not is_inert(info) and read != info.default:
            yield f"{prefix}{given}"


def _superseded(actor: ActorConfig, role: str) -> Iterator[str]:
    """Keys that another one has replaced, or has no use for."""
    correction = actor.rollout_correction
    if role == "actor":
        if actor.clip_ratio_c is not None and not LOSSES[actor.policy_loss].dual_clip:
            yield "clip_ratio_c"
        if actor.use_bias_correction_kl and not (actor.use_kl_loss and actor.kl_loss_coef):
            yield "use_bias_correction_kl"
        if correction is not None and correction.drop_rejected and not correction.drops:
            yield "rollout_correction.drop_rejected"
    decays = actor.optim.weight_decay != 0.0
    if role not in FORWARD_ROLES and actor.optim.no_decay is not None and not decays:
        yield "optim.no_decay"
    rows = [name for name in _MICRO_ROWS if getattr(actor, name) is not None]
    yield from rows if actor.use_dynamic_bsz else rows[1:]
    if actor.optim.lr_warmup_steps_ratio and not takes_warmup_ratio(actor.optim):
        yield "optim.lr_warmup_steps_ratio"


def takes_warmup_ratio(optim: OptimConfig) -> bool:
    """Whether ``lr_warmup_steps_ratio`` says the steps of the warm-up: a total is known, and
    nothing else says them."""
    given = "lr_warmup_steps" in optim.model_fields_set
    return (
        bool(optim.lr_warmup_steps_ratio) and optim.total_training_steps is not None and not given
    )
