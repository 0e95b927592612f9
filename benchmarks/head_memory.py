"""``python -m benchmarks.head_memory chunked|plain TOKENS VOCABULARY WIDTH``: MiB that the head's
peak adds."""

from __future__ import annotations

import sys

import torch
from nexrl_worker.training.model.lm_head import (
    HeadCall,
    active_chunks,
    chunk_length,
    head_log_probs,
)
from nexrl_worker.training.observe.costs import peak_memory
from torch import Tensor

_CPU = torch.device("cpu")


def main(way: str, tokens: int, vocabulary: int, width: int) -> None:
    """Forward and backward once, on random numbers."""
    hidden = torch.randn(tokens, width).requires_grad_()
    weight = (0.05 * torch.randn(vocabulary, width)).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,))
    with peak_memory(_CPU) as peak:
        log_probs, entropies = (_chunked if way == "chunked" else _plain)(hidden, weight, labels)
        (log_probs.sum() + 0.1 * entropies.sum()).backward()  # type: ignore[no-untyped-call]
    sys.stdout.write(f"{peak.mib - peak.before}\n")
    sys.stdout.flush()


def _chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    length = chunk_length(weight.shape[0], _CPU)
    active = active_chunks(torch.ones(labels.shape, dtype=torch.bool), length)
    return head_log_probs(hidden, weight, None, HeadCall(labels, 1.0, length, active, True))


def _plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logs = torch.log_softmax(hidden @ weight.t(), dim=-1)
    return logs.gather(1, labels[:, None]).squeeze(1), -(logs.exp() * logs).sum(dim=-1)


if __name__ == "__main__":
    main(sys.argv[1], *(int(argument) for argument in sys.argv[2:]))
