"""Estimates of how far the policy is from a reference: per token from one log-probability, or over
the top k tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from nexrl_worker.training.errors import InvalidValue

KINDS = ("k1", "kl", "abs", "k2", "mse", "k3", "low_var_kl", "k1+", "k3+")


def kl_terms(log_probs: Tensor, reference: Tensor, kind: str, old: Tensor | None = None) -> Tensor:
    """Per-token estimates of KL(policy || reference), d = lp - ref (Schulman, "Approximating KL
    divergence", 2020).

    k1 (kl): d, whose gradient has zero mean; abs: |d|; k2 (mse): d^2/2, whose gradient is that of
    KL(policy||ref); k3 (low_var_kl): exp(-d) - 1 + d, whose gradient is that of KL(ref||policy).
    k1+ and k3+ have the value of k1 and k3 with the gradient of k2. With `old` times the ratio
    exp(lp - old), whose gradient counts: unbiased for tokens that another policy sampled
    (DeepSeek-AI, "DeepSeek-V3.2", 2025); at ratio 1 k3 then has k2's gradient.
    """
    if old is not None:
        return (log_probs - old).exp() * kl_terms(log_probs, reference, kind)
    difference = log_probs - reference
    square = 0.5 * difference.square()
    match kind:
        case "k1" | "kl":
            return difference
        case "abs":
            return difference.abs()
        case "k2" | "mse":
            return square
        case "k3" | "low_var_kl":
            return torch.expm1(-difference) + difference
        case "k1+" | "k3+":
            return square + (kl_terms(log_probs, reference, kind[:2]) - square).detach()
    raise InvalidValue(f"unknown kl_loss_type {kind!r}", expected=", ".join(KINDS), actual=kind)


def top_k_kl(
    student: Tensor, student_rest: Tensor | None, teacher: Tensor, forward: bool
) -> Tensor:
    """KL over K tokens and one bucket for the rest of the mass, [...]; forward:
    KL(teacher||student), else reverse.

    Shapes: student, teacher [...,K] log-probabilities of the same tokens, each normalised over a
    whole vocabulary; student_rest [...] the log-probability of all others, None where K is the
    whole vocabulary (no bucket then: the exact KL). A coarsening of the vocabulary, so never more
    than the full KL.
    """
    if student_rest is not None:
        student = torch.cat([student, student_rest[..., None]], dim=-1)
        teacher = torch.cat([teacher, _rest_of(teacher)[..., None]], dim=-1)
    first, second = (teacher, student) if forward else (student, teacher)
    shares = first.exp()
    # What has no mass adds nothing, whatever stands on the other side; the inner where keeps 0 x
    # inf out of gradients.
    nothing = shares == 0
    return torch.where(nothing, 0.0, shares * torch.where(nothing, 0.0, first - second)).sum(dim=-1)


def _rest_of(log_probs: Tensor) -> Tensor:
    """log(1 - sum p), at least the log of the smallest mass that a float32 sum of probabilities can
    tell from 1."""
    mass = log_probs.double().exp().sum(dim=-1)
    return (1.0 - mass).clamp(min=1e-7).log().to(log_probs.dtype)
