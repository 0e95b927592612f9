"""What one operation computes, prepared once from configuration, arguments and batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nexrl_contract.batch import CheckedBatch, check_batch
from nexrl_contract.losses import LOSSES, TOP_K_LOSSES, VALUE_LOSS, Loss
from nexrl_contract.operations import OPERATIONS, Operation
from nexrl_contract.sections import ActorConfig

from nexrl_worker.training.batch.layout import Layout, Rows
from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.losses.aggregation import MODES, Aggregation, Correction
from nexrl_worker.training.losses.formulas import Clip

_CLIP = Clip()
CURRENT = "current"  # of distillation_student: what else it may be is the name of a tensor


@dataclass(frozen=True)
class LossSettings:
    """Settings of one update.

    `dropping`: what the correction rejects is not scored. `kl_times_ratio`: the KL term is weighed
    by exp(lp - old). `distillation` is the coefficient of a teacher's term, None without a teacher;
    where the teacher gave the sampled tokens' log-probabilities, those of `student` are subtracted
    from them. `value_clip`: a critic's new values are clipped to it around the batch's.
    """

    loss: Loss
    aggregation: Aggregation
    clip: Clip = _CLIP
    correction: Correction | None = None
    dropping: bool = False
    entropy_coeff: float = 0.0
    kl_coeff: float = 0.0
    kl_type: str = "k3"
    kl_times_ratio: bool = False
    distillation: float | None = None
    student: str = CURRENT
    value_clip: float = 0.0

    @property
    def uses_kl(self) -> bool:
        return self.kl_coeff != 0.0

    @property
    def reads_old(self) -> bool:
        """Whether `old_log_probs` would matter: for a ratio, or for a rollout correction."""
        by_ratio = self.loss.ratio or (self.uses_kl and self.kl_times_ratio)
        return by_ratio or self.correction is not None


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
    loss: LossSettings | None

    @property
    def layout(self) -> Layout:
        """Widths of the batch."""
        return Layout(self.checked.sequence, self.checked.response)

    @property
    def reads_reference(self) -> bool:
        """Whether a second model, the frozen reference, would take part."""
        if self.loss is not None:
            return self.loss.uses_kl and "ref_log_prob" not in self.checked.names
        return "ref_log_prob" in self.operation.answers

    @property
    def dropping(self) -> Correction | None:
        """The rollout correction whose rejected tokens are not scored."""
        return self.loss.correction if self.loss is not None and self.loss.dropping else None


def prepare(actor: ActorConfig, operation: str, rows: Rows, params: Mapping[str, Any]) -> Prepared:
    """Raises InvalidValue, and INVALID_TENSOR as `check_batch` does. Local, and reads no tensor."""
    row = OPERATIONS[operation]
    checked = check_batch(rows.header, row, params, actor)
    loss: LossSettings | None = None
    if row.learns == "values":
        aggregation = _aggregation(actor.loss_agg_mode, actor.loss_scale_factor)
        loss = LossSettings(VALUE_LOSS, aggregation, value_clip=actor.cliprange_value)
    elif row.trains:
        loss = loss_settings(actor, operation, rows, params)
    return Prepared(row, params, rows, checked, _temperature(actor, rows), loss)


def loss_settings(
    actor: ActorConfig, operation: str, rows: Rows, params: Mapping[str, Any]
) -> LossSettings:
    """The operation's settings; `params`, of distillation the metadata, win over `actor`."""
    distils = OPERATIONS[operation].learns == "distillation"
    settings: Mapping[str, Any] = rows.metadata if distils else {}
    loss = _distillation_loss(actor, rows, params) if distils else _policy_loss(actor, params)
    mode = loss.aggregation or settings.get("loss_agg_mode") or actor.loss_agg_mode
    if loss.aggregation is None and mode not in MODES:
        raise InvalidValue(
            f"unknown loss_agg_mode {mode!r}", expected=", ".join(MODES), actual=str(mode)
        )
    entropy_coeff = settings.get("entropy_coeff")
    given = actor.rollout_correction if loss.advantages else None
    return LossSettings(
        loss=loss,
        aggregation=_aggregation(mode, actor.loss_scale_factor),
        clip=_distillation_clip(actor) if distils else _clip(actor, loss),
        correction=None if given is None else Correction(given.mode, given.lower, given.upper),
        dropping=given is not None and given.drops,
        entropy_coeff=_number(
            "entropy_coeff", actor.entropy_coeff if entropy_coeff is None else entropy_coeff
        ),
        kl_coeff=_number("kl_loss_coef", actor.kl_loss_coef) if actor.use_kl_loss else 0.0,
        kl_type=actor.kl_loss_type,
        kl_times_ratio=actor.use_bias_correction_kl,
        distillation=_coefficient(rows, params) if distils else None,
        student=actor.distillation_student,
    )


def _policy_loss(actor: ActorConfig, params: Mapping[str, Any]) -> Loss:
    return LOSSES[params.get("loss") or actor.policy_loss]


def _distillation_loss(actor: ActorConfig, rows: Rows, params: Mapping[str, Any]) -> Loss:
    """Of a teacher's candidates, or a policy loss: clipped where asked for; without old_log_probs
    the ratio is 1 and the gradient that of REINFORCE."""
    kind = params.get("distillation_loss") or actor.distillation_loss
    if kind in TOP_K_LOSSES:
        return TOP_K_LOSSES[kind]
    if actor.use_distillation_clipping:
        return LOSSES["ppo"]
    return LOSSES["importance_sampling" if rows.has("old_log_probs") else "reinforce"]


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
    low, high = actor.distillation_cliprange_low, actor.distillation_cliprange_high
    both = actor.distillation_cliprange
    return Clip(both if low is None else low, both if high is None else high)


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
