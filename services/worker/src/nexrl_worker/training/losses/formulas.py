"""The losses and divergences: one pure function each, from values per scored token to one per
token.

Notation: lp log-probability under the current weights, old the sampler's, r = exp(lp - old), A the
advantage, sg[.] stop-gradient. Everything that comes in has been selected under the mask, so
nothing masked can leak.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nexrl_worker.training.errors import InvalidValue

KL_TYPES = ("k1", "kl", "abs", "k2", "mse", "k3", "low_var_kl", "k1+", "k3+")
_FAR = 60.0  # e^60 lies beyond every clip bound; its product with an advantage is finite in float32


@dataclass(frozen=True)
class Clip:
    """Bounds of the ratio: [1 - low, 1 + high] (None: no such bound), and the dual clip c for A < 0
    (None: off)."""

    low: float | None = 0.2
    high: float = 0.2
    dual: float | None = None


@dataclass(frozen=True)
class Tokens:
    """Values per token [n,R], zero where the bool `mask` [n,R] is False; `old` is sg[lp] where the
    batch had none.

    `weights` are the client's own, of the `linear` loss.
    """

    log_probs: Tensor
    old: Tensor
    advantages: Tensor
    weights: Tensor
    mask: Tensor

    @property
    def log_ratio(self) -> Tensor:
        return self.log_probs - self.old


@dataclass(frozen=True)
class PerToken:
    """A loss [n,R], its ratio [n,R], and where that lay beyond a bound that bites (bool [n,R])."""

    loss: Tensor
    ratio: Tensor | None = None
    clipped_low: Tensor | None = None
    clipped_high: Tensor | None = None
    clipped_dual: Tensor | None = None


def select_tokens(
    log_probs: Tensor,
    mask: Tensor,
    old: Tensor | None,
    advantages: Tensor | None,
    weights: Tensor | None = None,
) -> Tokens:
    """Tokens with everything masked replaced by 0 before any exp; `mask` is bool [n,R]."""
    kept = torch.where(mask, log_probs, 0.0)

    def chosen(values: Tensor | None) -> Tensor:
        return torch.zeros_like(kept) if values is None else torch.where(mask, values, 0.0).detach()

    before = kept.detach() if old is None else chosen(old)
    return Tokens(kept, before, chosen(advantages), chosen(weights), mask)


def ppo(tokens: Tokens, clip: Clip) -> PerToken:
    """max(-A r, -A clip(r, 1-low, 1+high)); with a dual clip c, min(that, -A c) where A < 0.

    Schulman et al., "Proximal Policy Optimization Algorithms", 2017; separate bounds: Yu et al.,
    "DAPO", 2025; dual clip: Ye et al., "Mastering Complex Control in MOBA Games with Deep
    Reinforcement Learning", 2020.
    """
    return _clipped(tokens, tokens.log_ratio, clip)


def gspo(tokens: Tokens, clip: Clip) -> PerToken:
    """PPO-clip with the ratio sg[s] exp(lp - sg[lp]), s = exp(mean over the row's scored tokens of
    lp - old).

    Zheng et al., "Group Sequence Policy Optimization", 2025, the token form (GSPO-token); by row
    means.
    """
    lengths = tokens.mask.sum(dim=-1, keepdim=True).clamp(min=1)
    whole = tokens.log_ratio.sum(dim=-1, keepdim=True).detach() / lengths
    return _clipped(tokens, whole + (tokens.log_probs - tokens.log_probs.detach()), clip)


def _clipped(tokens: Tokens, log_ratio: Tensor, clip: Clip) -> PerToken:
    """PPO's loss for the ratio exp(log_ratio) [n,R]."""
    gain = tokens.advantages
    low, high = None if clip.low is None else 1.0 - clip.low, 1.0 + clip.high
    bounded = gain >= 0 if clip.dual is None else torch.ones_like(tokens.mask)
    ratio = _finite_ratio(log_ratio, bounded)
    loss = torch.maximum(-gain * ratio, -gain * ratio.clamp(low, high))
    below = torch.zeros_like(tokens.mask) if low is None else (gain < 0) & (ratio < low)
    dual = None
    if clip.dual is not None:
        dual = (gain < 0) & (ratio > clip.dual)
        loss = torch.where(gain < 0, torch.minimum(loss, -gain * clip.dual), loss)
    return PerToken(loss, log_ratio.detach().exp(), below, (gain > 0) & (ratio > high), dual)


def _finite_ratio(log_ratio: Tensor, unread: Tensor) -> Tensor:
    """exp(log_ratio) [n,R], and no more than e^60 where a ratio beyond that does not count (bool
    `unread` [n,R]).

    There the loss and its gradient are finite by the formula, but inf x 0 would make them NaN.
    """
    return torch.exp(torch.where(unread, log_ratio.clamp(max=_FAR), log_ratio))


def cispo(tokens: Tokens, clip: Clip) -> PerToken:
    """-sg[min(r, 1+high)] A lp; also at least 1-low where a lower bound is set. No token loses its
    gradient.

    MiniMax, "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention", 2025.
    """
    ratio = tokens.log_ratio.detach().exp()
    high = 1.0 + clip.high
    low = None if clip.low is None else 1.0 - clip.low
    below = torch.zeros_like(tokens.mask) if low is None else ratio < low
    return PerToken(
        -ratio.clamp(low, high) * tokens.advantages * tokens.log_probs, ratio, below, ratio > high
    )


def importance_sampling(tokens: Tokens, clip: Clip) -> PerToken:
    """-r A: the off-policy policy gradient (Degris et al., "Off-Policy Actor-Critic", 2012)."""
    ratio = _finite_ratio(tokens.log_ratio, tokens.advantages == 0)
    return PerToken(-ratio * tokens.advantages, tokens.log_ratio.detach().exp())


def reinforce(tokens: Tokens, clip: Clip) -> PerToken:
    """-A lp (Williams, "Simple statistical gradient-following algorithms", 1992)."""
    return PerToken(-tokens.advantages * tokens.log_probs)


def cross_entropy(tokens: Tokens, clip: Clip) -> PerToken:
    """-lp: maximum likelihood, as in supervised fine-tuning."""
    return PerToken(-tokens.log_probs)


def linear(tokens: Tokens, clip: Clip) -> PerToken:
    """w lp with the client's own w. With w = dL/dlp its sum has the gradient of any loss L made
    outside."""
    return PerToken(tokens.weights * tokens.log_probs)


FUNCTIONS: dict[str, Callable[[Tokens, Clip], PerToken]] = {
    "ppo": ppo,
    "grpo": ppo,
    "gspo": gspo,
    "cispo": cispo,
    "importance_sampling": importance_sampling,
    "reinforce": reinforce,
    "cross_entropy": cross_entropy,
    "linear": linear,
}
"""The formula of each loss of :data:`nexrl_contract.losses.LOSSES`."""


def value_loss(
    values: Tensor, returns: Tensor, old: Tensor | None, clip: float
) -> tuple[Tensor, Tensor]:
    """0.5 max((v - ret)^2, (clip(v, old - c, old + c) - ret)^2); without old values 0.5 (v -
    ret)^2: per token, and where the clipped branch won (bool). All shapes [n,R].

    Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
    2016; the clip is that of OpenAI's PPO (Engstrom et al., "Implementation Matters in Deep Policy
    Gradients", 2020).
    """
    plain = (values - returns).square()
    if old is None:
        return 0.5 * plain, torch.zeros_like(plain, dtype=torch.bool)
    clipped = (torch.clamp(values, old - clip, old + clip) - returns).square()
    return 0.5 * torch.maximum(plain, clipped), clipped > plain


# -- divergence from a reference or a teacher


def kl_terms(log_probs: Tensor, reference: Tensor, kind: str, old: Tensor | None = None) -> Tensor:
    """Estimates of KL(policy || reference) per token, d = lp - ref; all shapes [n,R] (Schulman,
    "Approximating KL divergence", 2020).

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
    raise InvalidValue(f"unknown kl_loss_type {kind!r}", expected=", ".join(KL_TYPES), actual=kind)


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
    """log(1 - sum p) [...] of log_probs [...,K], at least the log of the smallest mass that a
    float32 sum of probabilities can tell from 1."""
    mass = log_probs.double().exp().sum(dim=-1)
    return (1.0 - mass).clamp(min=1e-7).log().to(log_probs.dtype)
