"""The norm of large gradients."""

from __future__ import annotations

import pytest
import torch
from nexrl_worker.training.optim import piece_norms


@pytest.mark.parametrize(
    "sizes", [[(4_000_001,), (3,), (1024, 2)], [(0,), (5, 1024)], [(1500, 2001)]]
)
def test_large_float32_gradients_have_the_norm_of_float64(sizes: list[tuple[int, ...]]) -> None:
    """Summed one after the other in float32, the first of them would be 1e-4 off."""
    random = torch.Generator().manual_seed(0)
    grads = [torch.randn(size, generator=random) * 1e-4 for size in sizes]
    wanted = torch.cat([grad.flatten() for grad in grads]).double().norm()
    assert float(piece_norms(grads).double().square().sum().sqrt()) == pytest.approx(
        float(wanted), rel=1e-7
    )
