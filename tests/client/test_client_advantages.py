"""Advantages, against the formulas written out row by row and against another library."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nexrl_client import InvalidBatch, gae, group_relative_advantages, whiten
from torchrl.objectives.value.functional import generalized_advantage_estimate

SCORES = [1.0, 0.25, -2.0, 0.1, 0.1, 0.1, 7.0]
GROUPS = ["a", "b", "a", "c", "c", "c", "a"]


def by_hand(estimator: str, scores: list[float], groups: list[Any]) -> list[float]:
    """The papers' formulas, one score at a time."""
    found = []
    for score, group in zip(scores, groups, strict=True):
        members = [other for other, name in zip(scores, groups, strict=True) if name == group]
        if len(members) == 1:
            found.append(score / (1 + 1e-6) if estimator == "grpo" else score)
        elif estimator == "grpo":
            found.append((score - statistics.fmean(members)) / (statistics.stdev(members) + 1e-6))
        elif estimator == "rloo":
            members.remove(score)
            found.append(score - statistics.fmean(members))
        else:
            found.append(score - statistics.fmean(members))
    return found


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "dr_grpo"])
@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-100, 100), st.integers(0, 3)), min_size=1, max_size=12))
def test_group_relative(estimator: Any, rows: list[tuple[float, int]]) -> None:
    """Every estimator is its paper's formula, for groups of any size in any order, one score among
    them."""
    scores, groups = [score for score, _ in rows], [group for _, group in rows]
    expected = by_hand(estimator, scores, groups)
    found = group_relative_advantages(np.asarray(scores), groups, estimator=estimator)
    # (s - mean) of equal scores is rounding, which GRPO divides by as little as 1e-6
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-6)
    assert found.dtype == np.float64


def test_numbers_to_remember() -> None:
    """Two right and two wrong answers: GRPO 0.866, RLOO 2/3, Dr. GRPO 1/2, and the opposite."""
    scores = np.asarray([1, 0, 0, 1])
    for estimator, value in (("grpo", 0.8660239), ("rloo", 2 / 3), ("dr_grpo", 0.5)):
        found = group_relative_advantages(scores, [0, 0, 0, 0], estimator=estimator)  # type: ignore[arg-type]
        np.testing.assert_allclose(found, np.asarray([value, -value, -value, value]), rtol=1e-6)
        assert found.dtype == np.float32


def test_under_a_mask() -> None:
    """With a mask [B, R] every scored token has its row's advantage, and the others 0."""
    mask = np.asarray([[1, 1, 0], [0, 1, 1]])
    found = group_relative_advantages(np.asarray([3.0, 1.0]), ["x", "x"], mask, estimator="dr_grpo")
    assert np.array_equal(found, [[1, 1, 0], [0, -1, -1]])


def test_kinds() -> None:
    """torch gives torch of the same dtype, lists with a torch mask too; groups may be arrays,
    tensors or any names."""
    for groups in (
        GROUPS,
        np.asarray(GROUPS),
        [(name, 1) for name in GROUPS],
        torch.tensor([0, 1, 0, 2, 2, 2, 0]),
    ):
        found = group_relative_advantages(torch.tensor(SCORES, dtype=torch.float64), groups)
        assert isinstance(found, torch.Tensor) and found.dtype == torch.float64
        np.testing.assert_allclose(
            found.numpy(), by_hand("grpo", SCORES, GROUPS), rtol=1e-9, atol=1e-9
        )
    tiled = group_relative_advantages(SCORES, GROUPS, torch.ones(7, 2, dtype=torch.int32))
    assert isinstance(tiled, torch.Tensor) and (tiled.dtype, tiled.shape) == (torch.float32, (7, 2))
    halves = group_relative_advantages(
        torch.tensor([1.0, 0.0], dtype=torch.bfloat16, requires_grad=True), [0, 0]
    )
    assert halves.dtype == torch.bfloat16 and not halves.requires_grad


def gae_by_hand(rewards: Any, values: Any, mask: Any, gamma: float, lam: float) -> tuple[Any, Any]:
    """A_i = sum over the later scored tokens j of (gamma lam)^(j-i) delta_j: the sum, not the
    recursion."""
    advantages, returns = np.zeros(rewards.shape), np.zeros(rewards.shape)
    for row in range(len(rewards)):
        columns = [column for column in range(rewards.shape[1]) if mask[row, column]]
        value = [float(values[row, column]) for column in columns] + [0.0]
        deltas = [
            float(rewards[row, c]) + gamma * value[i + 1] - value[i] for i, c in enumerate(columns)
        ]
        for i, column in enumerate(columns):
            total = sum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(deltas)))
            advantages[row, column], returns[row, column] = total, total + value[i]
    return advantages, returns


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0), (0.0, 0.5)])
def test_gae_is_its_sum(gamma: float, lam: float) -> None:
    """Over ragged masks with holes, the advantages are the discounted sums over the scored tokens
    alone."""
    random = np.random.default_rng(0)
    rewards, values = random.normal(size=(2, 6, 9))
    mask = random.random((6, 9)) < 0.6
    mask[0], mask[1] = False, True
    found = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for mine, expected in zip(found, gae_by_hand(rewards, values, mask, gamma, lam), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-12, atol=1e-12)


def test_gae_is_torchrls() -> None:
    """torchrl's generalized_advantage_estimate of each row's scored tokens gives the same, in
    float64."""
    gamma, lam = 0.96875, 0.90625  # exact in float32, to which torchrl rounds them
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, 5, 8, dtype=torch.float64, generator=generator)
    mask = torch.rand(5, 8, generator=generator) < 0.7
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    assert (
        isinstance(advantages, torch.Tensor) and advantages.dtype == returns.dtype == torch.float64
    )
    for row in range(5):
        value, reward = values[row, mask[row]][:, None], rewards[row, mask[row]][:, None]
        following = torch.cat([value[1:], torch.zeros(1, 1, dtype=torch.float64)])
        done = torch.zeros(len(value), 1, dtype=torch.bool)
        done[-1] = True
        theirs = generalized_advantage_estimate(gamma, lam, value, following, reward, done, done)
        for mine, expected in zip((advantages, returns), theirs, strict=True):
            torch.testing.assert_close(mine[row, mask[row]], expected[:, 0], rtol=1e-12, atol=1e-12)
            assert not mine[row, ~mask[row]].any()


def test_what_is_masked_never_matters() -> None:
    """NaN and infinity under the mask change nothing, in advantages, returns and whitening."""
    mask = np.asarray([[1, 0, 1, 1, 0]])
    rewards, values = np.asarray([[0.0, 0, 0, 1, 0]]), np.asarray([[0.5, 0, 0.25, 0.5, 0]])
    clean = gae(rewards, values, mask)
    dirty = gae(np.where(mask, rewards, np.inf), np.where(mask, values, np.nan), mask)
    assert all(np.array_equal(one, other) for one, other in zip(clean, dirty, strict=True))
    assert np.array_equal(whiten(np.where(mask, clean[0], np.nan), mask), whiten(clean[0], mask))


def test_whitening() -> None:
    """Mean 0 and unbiased variance 1 over the scored tokens; one token, or none, is 0."""
    random = np.random.default_rng(2)
    values, mask = random.normal(3.0, 2.0, (4, 7)), random.random((4, 7)) < 0.6
    found = whiten(values, mask)
    chosen = [float(value) for value in values[mask]]
    scale = (statistics.variance(chosen) + 1e-8) ** 0.5
    np.testing.assert_allclose(
        found[mask], [(value - statistics.fmean(chosen)) / scale for value in chosen], rtol=1e-12
    )
    assert not found[~mask].any()
    assert (
        whiten([[5.0, 1.0]], [[1, 0]]).tolist()
        == whiten([[5.0, 1.0]], [[0, 0]]).tolist()
        == [[0, 0]]
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_relative_advantages([[1.0]], ["a"]), r"scores \[1, 1\]; it must be \[B\]"),
        (lambda: group_relative_advantages([1.0, 2.0], ["a"]), "1 groups for 2 scores"),
        (lambda: group_relative_advantages([1.0], np.zeros((1, 2))), r"groups must be \[B\]"),
        (lambda: group_relative_advantages([1.0], torch.zeros(1, 1)), r"groups must be \[B\]"),
        (lambda: group_relative_advantages([1.0], [("a", [1])]), r"groups must be \[B\]"),
        (lambda: group_relative_advantages([1.0], ["a"], [1]), r"mask has shape \[1\]"),
        (
            lambda: group_relative_advantages([1.0], ["a"], estimator="gpro"),
            "'gpro'; known are grpo, rloo, dr_grpo",
        ),  # type: ignore[arg-type]
        (lambda: gae([[1.0]], [[1.0, 2.0]], [[1]]), r"values \[1, 2\].*all must be \[B, R\]"),
        (lambda: whiten([1.0], [1]), r"all must be \[B, R\]"),
    ],
)
def test_wrong_shapes(call: Any, message: str) -> None:
    """What does not fit together is a ValueError that says what has which shape."""
    with pytest.raises(ValueError, match=message):
        call()
    assert issubclass(InvalidBatch, ValueError)
