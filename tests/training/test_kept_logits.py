"""The LM head's backward: what is kept from the forward, and what is computed again, give the same
bits."""

from __future__ import annotations

import pytest
import torch
from nexrl_worker.training.model import lm_head
from torch import Tensor


def gradients(temperature: float, entropy: bool, repeats: int = 1) -> list[Tensor]:
    """Of hidden states, weight and bias, over three chunks of which one has no label that
    counts."""
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(shape, generator=generator).requires_grad_()
        for shape in ((12, 5), (7, 5), (7,))
    ]
    hidden, weight, bias = leaves
    labels = torch.randint(0, 7, (12,), generator=generator)
    call = lm_head.HeadCall(labels, temperature, 4, (True, False, True), True)
    log_probs, entropies = lm_head.head_log_probs(hidden, weight, bias, call)
    loss = log_probs.square().sum() + (entropies.sum() if entropy else 0.0)
    for _ in range(repeats):
        for leaf in leaves:
            leaf.grad = None
        loss.backward(retain_graph=True)
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("room", [0, 4 * 7, 1 << 24])
def test_kept_logits_change_no_bit(
    monkeypatch: pytest.MonkeyPatch, room: int, temperature: float, entropy: bool
) -> None:
    """No chunk kept, one, or all: the gradients are equal; and so they are in a second backward,
    which finds none."""
    monkeypatch.setattr(lm_head, "_KEPT", {})
    expected = gradients(temperature, entropy)
    monkeypatch.setattr(lm_head, "_KEPT", {"cpu": room})
    for repeats in (1, 2):
        found = gradients(temperature, entropy, repeats)
        assert len(found) == 3
        assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
