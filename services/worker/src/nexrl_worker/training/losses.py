"""Policy losses: one pure function each, from values per scored token to a loss per token.

Notation: lp log-probability under the current weights, old the sampler's, r = exp(lp - old), A the advantage.
Everything that comes in has been selected under the mask (0 where masked), so nothing masked can leak.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nexrl_worker.training.errors import InvalidValue


@dataclass(frozen=True)
class Clip:
    """Bounds of the ratio: [1 - low, 1 + high], and the dual clip c for negative advantages (None: off)."""

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None


@dataclass(frozen=True)
class Tokens:
    """Values per token, all [n,R], zero where masked; `old` is sg[lp] where the batch had none."""

    log_probs: Tensor
    old: Tensor
    advantages: Tensor

    @property
    def ratio(self) -> Tensor:
        return torch.exp(self.log_probs - self.old)


def select_tokens(log_probs: Tensor, old: Tensor | None, advantages: Tensor | None, mask: Tensor) -> Tokens:
    """Tokens with everything masked replaced by 0 before any exp; `mask` is bool [n,R]."""
    kept = torch.where(mask, log_probs, 0.0)
    before = kept.detach() if old is None else torch.where(mask, old, 0.0)
    gain = torch.zeros_like(kept) if advantages is None else torch.where(mask, advantages, 0.0)
    return Tokens(kept, before.detach(), gain.detach())


def ppo(tokens: Tokens, clip: Clip) -> Tensor:
    """max(-A r, -A clip(r, 1-low, 1+high)); with a dual clip c, min(that, -A c) where A < 0.

    Schulman et al., "Proximal Policy Optimization Algorithms", 2017; separate bounds: Yu et al., "DAPO", 2025;
    dual clip: Ye et al., "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning", 2020.
    """
    ratio, gain = tokens.ratio, tokens.advantages
    loss = torch.maximum(-gain * ratio, -gain * ratio.clamp(1.0 - clip.low, 1.0 + clip.high))
    if clip.dual is None:
        return loss
    return torch.where(gain < 0, torch.minimum(loss, -gain * clip.dual), loss)


def importance_sampling(tokens: Tokens, clip: Clip) -> Tensor:
    """-r A: the off-policy policy gradient (Degris et al., "Off-Policy Actor-Critic", 2012). No clipping."""
    return -tokens.ratio * tokens.advantages


def reinforce(tokens: Tokens, clip: Clip) -> Tensor:
    """-A lp (Williams, "Simple statistical gradient-following algorithms", 1992)."""
    return -tokens.advantages * tokens.log_probs


def cross_entropy(tokens: Tokens, clip: Clip) -> Tensor:
    """-lp: maximum likelihood, as in supervised fine-tuning."""
    return -tokens.log_probs


@dataclass(frozen=True)
class PolicyLoss:
    """A loss and what it reads: advantages, and the ratio (which needs old log-probabilities)."""

    function: Callable[[Tokens, Clip], Tensor]
    needs_advantages: bool = True
    needs_old: bool = False


# "grpo" differs from "ppo" in how the trainer makes the advantages (Shao et al., "DeepSeekMath", 2024), not here.
LOSSES = {
    "ppo": PolicyLoss(ppo, needs_old=True),
    "grpo": PolicyLoss(ppo, needs_old=True),
    "importance_sampling": PolicyLoss(importance_sampling, needs_old=True),
    "reinforce": PolicyLoss(reinforce),
    "cross_entropy": PolicyLoss(cross_entropy, needs_advantages=False),
}


def policy_loss(name: str) -> PolicyLoss:
    """The registered loss; raises InvalidValue with the known names."""
    if name not in LOSSES:
        raise InvalidValue(f"unknown policy_loss {name!r}", expected=", ".join(LOSSES), actual=name)
    return LOSSES[name]
