"""The losses again, row by row and straight from the formulas: what tests hold against the
worker's.

Every function takes the log-probabilities of one row's scored tokens twice: `lp`, which gradients
go through, and `held`, the same numbers as constants, which stand wherever a formula says
stop-gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Tensor]


@dataclass(frozen=True)
class Loss:
    """One configuration of an update; the names are those of the issue, `low` None is no lower
    bound."""

    name: str
    mode: str = "token-mean"
    low: float | None = 0.2
    high: float = 0.2
    dual: float | None = None
    scale: float = 1.0
    entropy: float = 0.0
    kl: float = 0.0
    kl_type: str = "k3"
    kl_times_ratio: bool = False
    correction: dict[str, Any] | None = None
    drops: bool = False
    teacher: float | None = None
    student: str | None = None


def policy(loss: Loss, lp: Tensor, held: Tensor, row: Row) -> Tensor:
    """The policy term of one row's scored tokens, rollout correction included."""
    old = row.get("old_log_probs", held)
    gain = row.get("advantages", torch.zeros_like(held))
    if loss.teacher is not None:
        gain = gain + loss.teacher * (
            row["teacher_log_probs"] - (row[loss.student] if loss.student else held)
        )
    term = _terms(loss, lp, held, old, gain, row)
    if loss.correction is None:
        return term
    return term * correction(old, row["rollout_log_probs"], **loss.correction)


def _terms(loss: Loss, lp: Tensor, held: Tensor, old: Tensor, gain: Tensor, row: Row) -> Tensor:
    match loss.name:
        case "ppo" | "grpo":
            return _pessimistic(loss, torch.exp(lp - old), gain)
        case "gspo":
            whole = math.exp(float((held - old).mean())) if len(old) else 1.0
            return _pessimistic(loss, whole * torch.exp(lp) / torch.exp(held), gain)
        case "cispo":
            ratio = torch.exp(held - old).tolist()
            least = -math.inf if loss.low is None else 1 - loss.low
            weights = [min(max(r, least), 1 + loss.high) for r in ratio]
            return -torch.tensor(weights, dtype=lp.dtype) * gain * lp
        case "importance_sampling":
            return -gain * torch.exp(lp) / torch.exp(old)
        case "reinforce":
            return -gain * lp
        case "cross_entropy":
            return -lp
        case "linear":
            return row["loss_weights"] * lp
    raise ValueError(loss.name)


def _pessimistic(loss: Loss, ratio: Tensor, gain: Tensor) -> Tensor:
    """Case by case: a good token earns at most -A(1+high), a bad one costs |A|(1-low) at the least
    and |A|c at most."""
    assert loss.low is not None
    lines = []
    for r, a in zip(ratio, gain, strict=True):
        if a >= 0:
            bounded = r if r < 1 + loss.high else torch.full_like(r, 1 + loss.high)
        else:
            bounded = r if r > 1 - loss.low else torch.full_like(r, 1 - loss.low)
            bounded = (
                bounded
                if loss.dual is None or bounded < loss.dual
                else torch.full_like(r, loss.dual)
            )
        lines.append(-a * bounded)
    return torch.stack(lines) if lines else ratio


def correction(old: Tensor, rollout: Tensor, mode: str, lower: float, upper: float) -> Tensor:
    """w of one row's scored tokens."""
    gaps = (old - rollout).tolist()
    weights = (
        [math.exp(sum(gaps))] * len(gaps)
        if mode.startswith("sequence")
        else [math.exp(gap) for gap in gaps]
    )
    if mode.endswith("truncate"):
        return torch.tensor([min(max(w, lower), upper) for w in weights], dtype=old.dtype)
    return torch.tensor([w if lower <= w <= upper else 0.0 for w in weights], dtype=old.dtype)


def kept(old: Tensor, rollout: Tensor, mode: str, lower: float, upper: float) -> list[bool]:
    """Which of one row's scored tokens a mask does not reject."""
    assert mode.endswith("mask")
    return [w != 0.0 for w in correction(old, rollout, mode, lower, upper).tolist()]


def weighted_divergence(loss: Loss, lp: Tensor, held: Tensor, row: Row) -> Tensor:
    """The KL estimate of one row's scored tokens, times pi / pi_old where `loss` says so."""
    value = divergence(loss.kl_type, lp, held, row["ref_log_prob"])
    return (
        value * torch.exp(lp) / torch.exp(row.get("old_log_probs", held))
        if loss.kl_times_ratio
        else value
    )


def divergence(kind: str, lp: Tensor, held: Tensor, reference: Tensor) -> Tensor:
    """The KL estimate of one row's scored tokens; k1+ and k3+ are worth k1 and k3 and change as k2
    does."""
    d, fixed = lp - reference, held - reference
    match kind:
        case "k1" | "kl":
            return d
        case "abs":
            return torch.sqrt(d * d)
        case "k2" | "mse":
            return d * d / 2
        case "k3" | "low_var_kl":
            return torch.exp(-d) + d - 1
        case "k1+":
            return fixed + (d * d - fixed * fixed) / 2
        case "k3+":
            return torch.exp(-fixed) + fixed - 1 + (d * d - fixed * fixed) / 2
    raise ValueError(kind)


def over_candidates(student: Tensor, ids: Tensor, teacher: Tensor, forward: bool) -> Tensor:
    """KL of the distributions over K tokens and all others, [T]: student [T,V], ids and teacher
    [T,K] (log-probs)."""
    lines = []
    for logs, chosen, given in zip(student, ids, teacher, strict=True):
        q, p = torch.exp(logs[chosen]), torch.exp(given)
        if len(chosen) < len(logs):
            others = torch.ones(len(logs), dtype=torch.bool)
            others[chosen] = False
            q = torch.cat([q, torch.exp(logs[others]).sum()[None]])
            p = torch.cat([p, (1 - p.sum())[None]])
        one, other = (p, q) if forward else (q, p)
        lines.append((one * (torch.log(one) - torch.log(other))).sum())
    return torch.stack(lines) if lines else student.sum() * torch.zeros(0, dtype=student.dtype)


def aggregate(loss: Loss, lines: list[Tensor]) -> Tensor:
    """One number from the per-token values of every row (rows without a scored token are empty
    lines)."""
    used = [line for line in lines if len(line)]
    every = torch.cat(used)
    match (
        "sum"
        if loss.name == "linear"
        else "seq-mean-token-mean"
        if loss.name == "gspo"
        else loss.mode
    ):
        case "sum":
            return every.sum()
        case "token-mean":
            return every.mean()
        case "seq-mean-token-sum":
            return sum(line.sum() for line in used) / len(used)
        case "seq-mean-token-mean":
            return sum(line.mean() for line in used) / len(used)
        case "seq-mean-token-sum-norm":
            return sum(line.sum() for line in used) / (len(used) * loss.scale)
    raise ValueError(loss.mode)
