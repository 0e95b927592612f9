"""Advantages for trainers: pure functions of tensors, computed in float64. B rows, R response
positions.

Each takes torch tensors, NumPy arrays or lists, and gives back the kind that it got (float32 where
that has no floats). Masks are not 0 where a token is scored; what stands under a 0 never matters,
NaN included, and comes back as 0.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ._tensors import Tensor, TensorLike, check_shapes, is_tensor, restore, to_numpy
from .errors import ClientError, InvalidBatch

__all__ = ["Estimator", "gae", "group_relative_advantages", "whiten"]

Estimator: TypeAlias = Literal["grpo", "rloo", "dr_grpo"]
_ESTIMATORS = ("grpo", "rloo", "dr_grpo")
_WHITEN_EPS = 1e-8


def group_relative_advantages(
    scores: TensorLike,
    groups: Sequence[Hashable] | Tensor,
    mask: TensorLike | None = None,
    *,
    estimator: Estimator = "grpo",
    eps: float = 1e-6,
) -> Tensor:
    """Advantages of scores [B] against the other answers to the same prompt.

    groups are B hashable names or integers: equal ones are one group, in any order. Returns [B], or
    with a mask [B, R] each row's advantage where the mask is not 0, [B, R].

    For a score s in a group of n:

        grpo:    (s - mean) / (std + eps), std with n - 1     DeepSeekMath, arXiv 2402.03300
        rloo:    s - mean of the other n - 1                  Ahmadian et al., arXiv 2402.14740
        dr_grpo: s - mean                                     Liu et al., arXiv 2503.20783

    A group of one has nothing to compare with: its mean is 0 and its std 1. Raises InvalidBatch for
    shapes, ClientError for the estimator.
    """
    if estimator not in _ESTIMATORS:
        raise ClientError(
            f"there is no estimator {estimator!r}; known are {', '.join(_ESTIMATORS)}"
        )
    values = to_numpy(scores).astype(np.float64)
    check_shapes({"scores": values}, 1)
    index = _numbered(groups, len(values))
    counts = np.bincount(index)[index]
    sums = np.bincount(index, weights=values)[index]
    alone, others = counts == 1, np.maximum(counts - 1, 1)
    if estimator == "rloo":
        advantages = values - np.where(alone, 0.0, sums - values) / others
    else:
        advantages = values - np.where(alone, 0.0, sums / counts)
    if estimator == "grpo":
        variance = np.bincount(index, weights=advantages**2)[index] / others
        advantages = advantages / (np.where(alone, 1.0, np.sqrt(variance)) + eps)
    if mask is None:
        return restore(advantages, scores)
    scored = to_numpy(mask) != 0
    if scored.ndim != 2 or len(scored) != len(values):
        raise InvalidBatch(
            f"mask has shape {list(scored.shape)}; with {len(values)} scores it must be [B, R]"
        )
    return restore(np.where(scored, advantages[:, None], 0.0), scores, mask)


def gae(
    rewards: TensorLike,
    values: TensorLike,
    mask: TensorLike,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al., arXiv 1506.02438).

    rewards, values and mask are [B, R]. Returns advantages and returns, [B, R] each. Of a scored
    token t and the next scored token n of its row:

        delta_t  = r_t + gamma V_n - V_t
        A_t      = delta_t + gamma lam A_n
        return_t = A_t + V_t

    After the last scored token V and A are 0. Tokens outside the mask (a tool's output, padding)
    are passed over as if they were not there, so a reward belongs on a scored token. Raises
    InvalidBatch where the shapes differ.
    """
    reward, value, scored = (
        to_numpy(rewards).astype(np.float64),
        to_numpy(values).astype(np.float64),
        to_numpy(mask) != 0,
    )
    check_shapes({"rewards": reward, "values": value, "mask": scored}, 2)
    reward, value = np.where(scored, reward, 0.0), np.where(scored, value, 0.0)
    advantages, returns = np.zeros(reward.shape), np.zeros(reward.shape)
    next_advantage, next_value = np.zeros(len(reward)), np.zeros(len(reward))
    for column in reversed(range(reward.shape[1])):
        here, current = scored[:, column], value[:, column]
        delta = reward[:, column] + gamma * next_value - current
        next_advantage = np.where(here, delta + gamma * lam * next_advantage, next_advantage)
        next_value = np.where(here, current, next_value)
        advantages[:, column] = np.where(here, next_advantage, 0.0)
        returns[:, column] = np.where(here, next_advantage + current, 0.0)
    return restore(advantages, rewards, values, mask), restore(returns, rewards, values, mask)


def whiten(advantages: TensorLike, mask: TensorLike) -> Tensor:
    """Advantages [B, R] with mean 0 and variance 1 over the scored tokens of the whole batch.

    Each is (A - mean) / sqrt(variance + 1e-8) where mask [B, R] is not 0, and 0 elsewhere. The
    variance is the unbiased one; of fewer than two tokens it is 0. This is PPO's usual
    normalisation of GAE (Huang et al., The 37 implementation details of PPO, 2022, detail 7).
    Raises InvalidBatch where the shapes differ.
    """
    values, scored = to_numpy(advantages).astype(np.float64), to_numpy(mask) != 0
    check_shapes({"advantages": values, "mask": scored}, 2)
    chosen = values[scored]
    if chosen.size == 0:
        return restore(np.zeros(values.shape), advantages, mask)
    variance = chosen.var(ddof=1) if chosen.size > 1 else 0.0
    whitened = np.zeros(values.shape)
    whitened[scored] = (chosen - chosen.mean()) / np.sqrt(variance + _WHITEN_EPS)
    return restore(whitened, advantages, mask)


def _numbered(groups: Sequence[Hashable] | Tensor, rows: int) -> NDArray[np.int64]:
    """Each row's group as a number from 0."""
    names = to_numpy(groups).tolist() if is_tensor(groups) else list(groups)
    if len(names) != rows:
        raise InvalidBatch(
            f"there are {len(names)} groups for {rows} scores; give each score the name of its "
            "group"
        )
    numbers: dict[Hashable, int] = {}
    try:
        return np.asarray([numbers.setdefault(name, len(numbers)) for name in names], np.int64)
    except TypeError:  # rows of a 2-D array, or lists
        raise InvalidBatch(
            "groups must be [B]: one name or integer, which can be hashed, for each score"
        ) from None
