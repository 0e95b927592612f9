"""What one operation computes, prepared once: its settings from configuration, arguments and batch
together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nexrl_contract.batch import CheckedBatch, check_batch
from nexrl_contract.losses import LOSSES, Loss
from nexrl_contract.operations import DISTILLATION, OPERATIONS, Operation
from nexrl_contract.sections import ActorConfig, RolloutCorrectionConfig

from nexrl_worker.training.batch.micro_batch import Layout, Rows
from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.losses.aggregation import MODES, Aggregation
from nexrl_worker.training.losses.correction import Correction
from nexrl_worker.training.losses.policy import Clip

CURRENT = "current"  # of distillation_student: what else it may be is the name of a tensor


@dataclass(frozen=True)
class LossSettings:
    """Settings of one policy update.

    `distillation` is the coefficient of a teacher's term, None without a teacher; `top_k` its
    direction (forward_kl, reverse_kl) where the teacher gave candidates, None where it gave the
    sampled tokens' log-probabilities, from which those of `student` are then subtracted.
    `kl_times_ratio`: the KL term is weighed by exp(lp - old).
    """

    loss: Loss
    aggregation: Aggregation
    clip: Clip
    correction: Correction | None
    entropy_coeff: float
    kl_coeff: float
    kl_type: str
    kl_times_ratio: bool
    distillation: float | None
    top_k: str | None
    student: str

    @property
    def uses_kl(self) -> bool:
        return self.kl_coeff != 0.0

    @property
    def reads_old(self) -> bool:
        """Whether `old_log_probs` would matter: for a ratio, or for what a rollout correction
        weighs by."""
        if self.uses_kl and self.kl_times_ratio:
            return True
        return self.top_k is None and (self.loss.ratio or self.correction is not None)


@dataclass(frozen=True)
class ValueSettings:
    """Settings of a critic's update: new values are clipped to `clip` around the batch's."""

    clip: float
    aggregation: Aggregation


@dataclass(frozen=True)
class Prepared:
    """One operation on a batch, with all that is known before its rows are cut; made once, then
    planned, checked and run.

    `loss` is None where nothing is trained. `temperature` counts where the batch has no tensor
    `temperature` [B].
    """

    operation: Operation
    params: Mapping[str, Any]
    rows: Rows
    checked: CheckedBatch
    temperature: float
    loss: LossSettings | ValueSettings | None

    @property
    def layout(self) -> Layout:
        """Widths of the batch."""
        return Layout(self.checked.sequence, self.checked.response)

    @property
    def reads_reference(self) -> bool:
        """Whether a second model, the frozen reference, would take part."""
        if isinstance(self.loss, LossSettings):
            return self.loss.uses_kl and "ref_log_prob" not in self.checked.names
        return self.operation.name == "compute_ref_log_prob"

    @property
    def dropping(self) -> Correction | None:
        """The rollout correction whose rejected tokens are not scored."""
        correction = self.loss.correction if isinstance(self.loss, LossSettings) else None
        return correction if correction is not None and correction.drops else None


def prepare(actor: ActorConfig, operation: str, rows: Rows, params: Mapping[str, Any]) -> Prepared:
    """Raises InvalidValue, and INVALID_TENSOR as `check_batch` does. Local, and reads no tensor."""
    row = OPERATIONS[operation]
    checked = check_batch(rows.header, row, params, actor)
    loss: LossSettings | ValueSettings | None = None
    if operation == "update_critic":
        loss = ValueSettings(
            actor.cliprange_value, _aggregation(actor.loss_agg_mode, actor.loss_scale_factor)
        )
    elif row.trains:
        loss = loss_spec(actor, operation, rows, params)
    return Prepared(row, params, rows, checked, _temperature(actor, rows), loss)


def loss_spec(
    actor: ActorConfig, operation: str, rows: Rows, params: Mapping[str, Any]
) -> LossSettings:
    """The settings of this operation; `params` (`loss`, of distillation its settings) win over
    `actor`."""
    distils = operation == DISTILLATION
    settings: Mapping[str, Any] = rows.metadata if distils else {}
    kind = (params.get("distillation_loss") or actor.distillation_loss) if distils else None
    name = (
        _distillation_loss(actor, rows, kind)
        if distils
        else params.get("loss") or actor.policy_loss
    )
    loss = LOSSES[name]
    mode = loss.aggregation or settings.get("loss_agg_mode") or actor.loss_agg_mode
    if loss.aggregation is None and mode not in MODES:
        raise InvalidValue(
            f"unknown loss_agg_mode {mode!r}", expected=", ".join(MODES), actual=str(mode)
        )
    entropy_coeff = settings.get("entropy_coeff")
    correction = (
        actor.rollout_correction if loss.advantages and kind in (None, "policy_gradient") else None
    )
    return LossSettings(
        loss=loss,
        aggregation=_aggregation(mode, actor.loss_scale_factor),
        clip=_distillation_clip(actor) if distils else _clip(actor, loss),
        correction=None if correction is None else _correction(correction),
        entropy_coeff=_number(
            "entropy_coeff", actor.entropy_coeff if entropy_coeff is None else entropy_coeff
        ),
        kl_coeff=_number("kl_loss_coef", actor.kl_loss_coef) if actor.use_kl_loss else 0.0,
        kl_type=actor.kl_loss_type,
        kl_times_ratio=actor.use_bias_correction_kl,
        distillation=_coefficient(rows, params) if distils else None,
        top_k=kind if kind in ("forward_kl", "reverse_kl") else None,
        student=actor.distillation_student,
    )


def _temperature(actor: ActorConfig, rows: Rows) -> float:
    """The batch's metadata, else the configuration, else 1.0."""
    value = rows.metadata.get("temperature")
    if value is None:
        value = actor.rollout.temperature
    return 1.0 if value is None else _number("temperature", value, positive=True)


def _aggregation(mode: str, scale: float | None) -> Aggregation:
    if mode != "seq-mean-token-sum-norm":
        return Aggregation(mode)
    if scale is None:
        raise InvalidValue("loss_agg_mode seq-mean-token-sum-norm needs loss_scale_factor")
    return Aggregation(mode, _number("loss_scale_factor", scale, positive=True))


def _correction(given: RolloutCorrectionConfig) -> Correction:
    return Correction(given.mode, given.lower, given.upper, given.drop_rejected)


def _clip(actor: ActorConfig, loss: Loss) -> Clip:
    own_low, own_high = loss.clip or (actor.clip_ratio, actor.clip_ratio)
    given_low, given_high = actor.clip_ratio_low, actor.clip_ratio_high
    low = own_low if loss.lower_bound else None
    return Clip(
        low if given_low is None else given_low,
        own_high if given_high is None else given_high,
        actor.clip_ratio_c,
    )


def _distillation_clip(actor: ActorConfig) -> Clip:
    low, high, both = (
        actor.distillation_cliprange_low,
        actor.distillation_cliprange_high,
        actor.distillation_cliprange,
    )
    return Clip(both if low is None else low, both if high is None else high)


def _distillation_loss(actor: ActorConfig, rows: Rows, kind: str | None) -> str:
    """Clipped where asked for; without old_log_probs the ratio is 1 and the gradient that of
    REINFORCE."""
    if kind == "policy_gradient" and actor.use_distillation_clipping:
        return "ppo"
    return (
        "importance_sampling"
        if kind == "policy_gradient" and rows.has("old_log_probs")
        else "reinforce"
    )


def _coefficient(rows: Rows, params: Mapping[str, Any]) -> float:
    value = params.get("distillation_coeff")
    if value is None:
        value = rows.metadata.get("distillation_coeff")
    return 1.0 if value is None else _number("distillation_coeff", value)


def _number(name: str, value: Any, positive: bool = False) -> float:
    try:
        number = (
            float(value)
            if isinstance(value, int | float) and not isinstance(value, bool)
            else math.nan
        )
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not math.isfinite(number) or (positive and number <= 0.0):
        expected = "a positive finite number" if positive else "a finite number"
        raise InvalidValue(
            f"{name} must be {expected}, not {str(value)[:50]!r}",
            expected=expected,
            actual=str(value)[:50],
        )
    return number
