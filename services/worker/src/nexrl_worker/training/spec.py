"""What one operation computes: the loss settings of the configuration, the operation and its parameters together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nexrl_worker.training.aggregate import MODES
from nexrl_worker.training.batch import Layout, Rows
from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.losses import Clip, PolicyLoss, policy_loss

DISTILLATION = "update_actor_with_distillation"


@dataclass(frozen=True)
class LossSpec:
    """Settings of one loss evaluation; `distillation_coeff` is None unless the advantage comes from a teacher."""

    loss: PolicyLoss
    mode: str
    clip: Clip
    entropy_coeff: float
    kl_coeff: float
    kl_type: str
    temperature: float
    distillation_coeff: float | None

    @property
    def uses_kl(self) -> bool:
        return self.kl_coeff != 0.0


def temperature_of(actor: Any, rows: Rows, params: Mapping[str, Any]) -> float:
    """`params`, else metadata, else the configuration, else 1.0; raises InvalidValue unless positive and finite."""
    value = params.get("temperature")
    if value is None:
        value = rows.metadata.get("temperature")
    if value is None:
        value = actor.rollout.temperature
    return 1.0 if value is None else _number("temperature", value, positive=True)


def loss_spec(actor: Any, operation: str, rows: Rows, params: Mapping[str, Any]) -> LossSpec:
    """The settings of this operation: `params` (`loss` and the configuration's loss keys) win over `actor`."""

    def setting(key: str) -> Any:
        value = params.get(key)
        return getattr(actor, key) if value is None else value

    name = params.get("loss") or actor.policy_loss
    coefficient = None
    if operation == DISTILLATION:
        name = "importance_sampling" if rows.has("old_log_probs") else "reinforce"
        value = params.get("distillation_coeff", rows.metadata.get("distillation_coeff"))
        coefficient = 1.0 if value is None else _number("distillation_coeff", value)
    mode = setting("loss_agg_mode")
    if mode not in MODES:
        raise InvalidValue(f"unknown loss_agg_mode {mode!r}", expected=", ".join(MODES), actual=str(mode))
    both = setting("clip_ratio")
    low, high, dual = setting("clip_ratio_low"), setting("clip_ratio_high"), setting("clip_ratio_c")
    return LossSpec(
        loss=policy_loss(name),
        mode=mode,
        clip=Clip(both if low is None else low, both if high is None else high, dual),
        entropy_coeff=_number("entropy_coeff", setting("entropy_coeff")),
        kl_coeff=_number("kl_loss_coef", setting("kl_loss_coef")) if setting("use_kl_loss") else 0.0,
        kl_type=setting("kl_loss_type"),
        temperature=temperature_of(actor, rows, params),
        distillation_coeff=coefficient,
    )


def needed_tensors(spec: LossSpec, rows: Rows, layout: Layout) -> tuple[str, ...]:
    """The float tensors that the loss reads; raises InvalidValue where one is missing or of another shape."""
    distils = spec.distillation_coeff is not None
    required = ["teacher_log_probs"] if distils else ["advantages"] if spec.loss.needs_advantages else []
    optional = ["advantages"] if distils else []
    optional += ["old_log_probs"] if spec.loss.needs_old else []
    optional += ["ref_log_prob"] if spec.uses_kl else []
    for name in required:
        if not rows.has(name):
            raise InvalidValue(f"the batch has no {name}", tensor=name, expected="[B,S] or [B,R]", actual="missing")
    names = required + [name for name in optional if rows.has(name)]
    for name in names:
        layout.check_aligned(rows, name, per_row=name == "advantages")
    return tuple(names)


def _number(name: str, value: Any, positive: bool = False) -> float:
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not math.isfinite(number) or (positive and number <= 0.0):
        expected = "a positive finite number" if positive else "a finite number"
        raise InvalidValue(
            f"{name} must be {expected}, not {str(value)[:50]!r}", expected=expected, actual=str(value)[:50]
        )
    return number
