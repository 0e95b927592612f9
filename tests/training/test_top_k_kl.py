"""KL over a teacher's K tokens and one bucket for the rest: the formula, its ends, its gradient."""

from __future__ import annotations

import pytest
import torch
from nexrl_worker.training.losses.formulas import top_k_kl
from torch import Tensor

from tests.helpers.formulas import over_candidates

V, T = 9, 5


def logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return 2 * torch.randn(T, V, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def coarse(student: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the worker scores: the candidates' log-probabilities and that of all other tokens."""
    logs = torch.log_softmax(student, dim=-1)
    if ids.shape[-1] == V:
        return logs.gather(-1, ids), None
    return logs.gather(-1, ids), torch.logsumexp(logs.scatter(-1, ids, float("-inf")), dim=-1)


@pytest.mark.parametrize("forward", [True, False])
def test_whole_vocabulary_is_the_full_kl(forward: bool) -> None:
    """At K = V it is torch's own KL of two categorical distributions, and so is its gradient."""
    student, teacher = logits(0).requires_grad_(), torch.log_softmax(logits(1), dim=-1)
    values, ids = teacher.topk(V, dim=-1)
    found = top_k_kl(*coarse(student, ids), values, forward)
    pair = [torch.distributions.Categorical(logits=one) for one in (teacher, student)]
    wanted = torch.distributions.kl_divergence(*(pair if forward else pair[::-1]))
    assert torch.allclose(found, wanted, rtol=1e-12)
    grads = [torch.autograd.grad(kl.sum(), student)[0] for kl in (found, wanted)]
    assert torch.allclose(*grads, rtol=0, atol=1e-13) and grads[0].abs().max() > 0.1


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_coarse_grained(k: int, forward: bool) -> None:
    """With K < V it is the KL of the coarse-grained distributions, its slope theirs, and never
    above the full KL."""
    student, teacher = logits(2).requires_grad_(), torch.log_softmax(logits(3), dim=-1)
    values, ids = teacher.topk(k, dim=-1)
    found = top_k_kl(*coarse(student, ids), values, forward)
    wanted = over_candidates(torch.log_softmax(student, dim=-1), ids, values, forward)
    assert torch.allclose(found, wanted, rtol=1e-9)
    grads = [torch.autograd.grad(kl.sum(), student)[0] for kl in (found, wanted)]
    assert torch.allclose(*grads, rtol=1e-9, atol=1e-12)
    every = torch.arange(V).expand(T, V)
    assert (
        found
        <= over_candidates(torch.log_softmax(student, dim=-1), every, teacher, forward) + 1e-12
    ).all()
    assert torch.autograd.gradcheck(
        lambda moved: top_k_kl(*coarse(moved, ids), values, forward), (student,)
    )


@pytest.mark.parametrize("forward", [True, False])
def test_equal_distributions_are_no_distance_apart(forward: bool) -> None:
    """KL and gradient are 0 where the student is the teacher, for every K."""
    for k in (1, 4, V):
        student = logits(4).requires_grad_()
        values, ids = torch.log_softmax(student.detach(), dim=-1).topk(k, dim=-1)
        found = top_k_kl(*coarse(student, ids), values, forward)
        assert found.abs().max() < 1e-12
        assert torch.autograd.grad(found.sum(), student)[0].abs().max() < 1e-12


@pytest.mark.parametrize("forward", [True, False])
def test_a_teacher_without_rest(forward: bool) -> None:
    """Probabilities that add up to 1, or by float32 rounding to more, give finite numbers and
    gradients."""
    student = logits(5, torch.float32).requires_grad_()
    values, ids = torch.log_softmax(40 * logits(6, torch.float32), dim=-1).topk(3, dim=-1)
    for given in (values, values + 1e-6):
        found = top_k_kl(*coarse(student, ids), given, forward)
        gradient = torch.autograd.grad(found.sum(), student)[0]
        assert (
            torch.isfinite(found).all()
            and torch.isfinite(gradient).all()
            and gradient.abs().max() > 0
        )


@pytest.mark.parametrize("forward", [True, False])
def test_mass_of_nothing(forward: bool) -> None:
    """A student without any mass on a token: its share is 0 in reverse, and no gradient is NaN in
    either direction."""
    student = logits(7)
    student[:, 0] = -2000.0
    student.requires_grad_()
    values, ids = torch.log_softmax(logits(8), dim=-1).topk(V, dim=-1)
    found = top_k_kl(*coarse(student, ids), values, forward)
    gradient = torch.autograd.grad(found.sum(), student)[0]
    assert torch.isfinite(found).all() and torch.isfinite(gradient).all()
    assert (found > 1).all() if forward else (found < 30).all()
