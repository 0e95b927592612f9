"""The losses: what each reads and fixes, and what of a model it scores. Their formulas are in the
worker, under the same names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

LossName = Literal[
    "ppo", "grpo", "gspo", "cispo", "importance_sampling", "reinforce", "cross_entropy", "linear"
]
AggregationMode = Literal[
    "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
]
DistillationLoss = Literal["policy_gradient", "forward_kl", "reverse_kl"]


@dataclass(frozen=True, slots=True)
class Loss:
    """One row of :data:`LOSSES`."""

    name: str
    objective: Literal["labels", "candidates", "values"] = "labels"
    """What of a model it scores: a batch's labels, a teacher's candidates at every label, or a
    critic's values."""
    advantages: bool = True
    """It reads ``advantages``, and a rollout correction may weigh it."""
    ratio: bool = False
    """It reads ``old_log_probs``."""
    weights: bool = False
    """It reads ``loss_weights``, the client's own, who gets ``log_probs`` back."""
    aggregation: str | None = None
    """The one way of summing it has; None takes ``loss_agg_mode``."""
    clip: tuple[float, float] | None = None
    """Its own default bounds of the ratio, below and above 1; None takes ``clip_ratio``."""
    lower_bound: bool = True
    """The ratio is bounded below even where the configuration names no such bound."""
    dual_clip: bool = False
    """``clip_ratio_c`` bounds it."""

    @property
    def loss_agg_mode(self) -> str | None:
        """The ``loss_agg_mode`` that is the one way of summing it has; None where it takes any, or
        has a way of its own."""
        return self.aggregation if self.aggregation in get_args(AggregationMode) else None


# "grpo" differs from "ppo" in how the trainer makes the advantages (Shao et al., "DeepSeekMath",
# 2024), not here.
LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("ppo", ratio=True, dual_clip=True),
        Loss("grpo", ratio=True, dual_clip=True),
        Loss(
            "gspo", ratio=True, dual_clip=True, aggregation="seq-mean-token-mean", clip=(3e-4, 4e-4)
        ),
        Loss("cispo", ratio=True, lower_bound=False),
        Loss("importance_sampling", ratio=True),
        Loss("reinforce"),
        Loss("cross_entropy", advantages=False),
        Loss("linear", advantages=False, weights=True, aggregation="sum"),
    )
}

TOP_K_LOSSES: dict[str, Loss] = {
    name: Loss(name, "candidates", advantages=False) for name in ("forward_kl", "reverse_kl")
}
"""A teacher's candidates as ``distillation_loss``; its other value is a policy loss."""

VALUE_LOSS = Loss("value", "values", advantages=False)
"""``update_critic``."""


@dataclass(frozen=True, slots=True)
class DatedLoss:
    """A policy loss of NexRL 1.x, which called them by date: "ppo" with what that one fixed."""

    dual_clip: float | None = None
    """Its ``clip_ratio_c`` where none is given; None: it never read one, and its recipes set one as
    a matter of course."""
    symmetric: bool = False
    """It clips by ``clip_ratio`` alone and is always token-mean."""


DATED_LOSSES: dict[str, DatedLoss] = {
    "NX_20250515": DatedLoss(),
    "NX_20250515_v2": DatedLoss(dual_clip=3.0),
    "NX_20241031": DatedLoss(symmetric=True),
}
