"""Names that configurations in the field use, turned into ours or refused by name."""

from __future__ import annotations

from typing import Any, get_args

from nexrl_contract.errors import ServiceError
from nexrl_contract.losses import LOSSES, AggregationMode
from nexrl_contract.sections import ActorConfig

_DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp64": "float64"}
ALIASES = {"loss_func_type": "policy_loss"}
"""Other names of keys of ``actor``."""
_CLIP_DEFAULT = ActorConfig.model_fields["clip_ratio"].default
_SINGLE_CLIP = ("NX_20250515", "NX_20241031")
"""Losses of NexRL 1.x that never read ``clip_ratio_c``, which its recipes set as a matter of
course."""


def normalise(config: dict[str, Any], role: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """``loss_func_type`` and its values, short dtype names, and what a loss fixes by itself;
    ``config`` stays as it is.

    Also the dotted names of the keys that the loss's old name makes mean nothing. Raises
    INVALID_CONFIG for a loss whose meaning cannot be had here.
    """
    actor = config.get("actor")
    if not isinstance(actor, dict):
        return config, ()
    dated = actor.get("loss_func_type", actor.get("policy_loss")) in _SINGLE_CLIP
    dropped = ("actor.clip_ratio_c",) if dated and actor.get("clip_ratio_c") is not None else ()
    actor = _own_loss(
        {name: value for name, value in actor.items() if not (dated and name == "clip_ratio_c")}
    )
    loss = LOSSES.get(str(actor.get("policy_loss"))) if role == "actor" else None
    if loss is not None and loss.aggregation in get_args(AggregationMode):
        actor.setdefault("loss_agg_mode", loss.aggregation)
    changed = actor.get("clip_ratio") not in (None, _CLIP_DEFAULT)  # recipes spell the default out
    if loss is not None and loss.clip is not None and changed:
        bounds = [name for name in ("clip_ratio_low", "clip_ratio_high") if actor.get(name) is None]
        actor |= dict.fromkeys(bounds, actor["clip_ratio"])
    optim = actor.get("optim")
    if (
        isinstance(optim, dict) and optim.get("total_training_steps") == 0
    ):  # how NexRL 1.x said: not known
        actor["optim"] = {**optim, "total_training_steps": None}
    fsdp = actor.get("fsdp_config")
    if isinstance(fsdp, dict):
        actor["fsdp_config"] = _short_dtypes(fsdp)
    return {**config, "actor": actor}, dropped


def _own_loss(actor: dict[str, Any]) -> dict[str, Any]:
    """NexRL 1.x called its losses by date: PPO-clip, the same with a dual clip, and a symmetric one
    by token mean."""
    key = "loss_func_type" if "loss_func_type" in actor else "policy_loss"
    if key == "loss_func_type":
        alias = actor.pop("loss_func_type")
        if actor.setdefault("policy_loss", alias) != alias:
            named = actor["policy_loss"]
            raise _refused(
                "loss_func_type",
                f"loss_func_type {alias!r} and policy_loss {named!r} differ; keep one",
            )
    name = actor.get("policy_loss")
    if not isinstance(name, str) or not name.startswith("NX_"):
        return actor
    if name == "NX_20250515":
        return {**actor, "policy_loss": "ppo"}
    if name == "NX_20250515_v2":
        return {"clip_ratio_c": 3.0, **actor, "policy_loss": "ppo"}
    if name == "NX_20241031":
        for bound in ("clip_ratio_low", "clip_ratio_high"):
            if actor.get(bound) not in (None, actor.get("clip_ratio")):
                raise _refused(
                    bound, f"{key} {name} clips by clip_ratio alone; use ppo, or leave {bound} out"
                )
        if actor.get("loss_agg_mode", "token-mean") != "token-mean":
            raise _refused(
                "loss_agg_mode", f"{key} {name} is always token-mean; use ppo for other modes"
            )
        return {**actor, "policy_loss": "ppo"}
    raise _refused(
        key, f"{key} {name!r} has no counterpart here; use ppo, gspo, cispo or importance_sampling"
    )


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
