"""The most likely tokens of every position, and log-probabilities of given ones, without ever
holding [T,V]."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nexrl_worker.training.batch.micro_batch import MicroBatch
from nexrl_worker.training.model.lm_head import chunk_length, divided, scaled_logits, temperature_at
from nexrl_worker.training.model.policy import PolicyModel

OfLogits = Callable[[Tensor, slice], tuple[Tensor, ...]]


@dataclass(frozen=True)
class CandidateScores:
    """Log-probabilities under the whole vocabulary: `labels` [n,R], of the given ids [n,R,K], of
    all others `rest`.

    `rest` [n,R] is None where the ids are the whole vocabulary; entropies [n,R]. 0 at labels that
    are not attended.
    """

    labels: Tensor
    candidates: Tensor
    rest: Tensor | None
    entropies: Tensor


def top_k(policy: PolicyModel, micro: MicroBatch, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels' log-probabilities [n,R], and the `k` most likely ids with theirs [n,R,K]; call
    without gradients."""

    def of_logits(logits: Tensor, part: slice) -> tuple[Tensor, ...]:
        total = torch.logsumexp(logits, dim=-1)
        best = logits.topk(k, dim=-1)
        own = logits.gather(1, micro.labels[part, None]).squeeze(1)
        return own - total, best.indices, best.values - total[:, None]

    labels, ids, values = policy(lambda: _in_chunks(policy, micro, of_logits))
    return micro.scatter(labels), micro.scatter(ids), micro.scatter(values)


def score_candidates(policy: PolicyModel, micro: MicroBatch, ids: Tensor) -> CandidateScores:
    """Score the tokens `ids` [n,R,K] at every label; differentiable, each chunk being computed
    again in the backward."""
    chosen = ids.flatten(0, 1)[micro.slots]
    everything = ids.shape[-1] == policy.vocabulary

    def of_logits(logits: Tensor, part: slice) -> tuple[Tensor, ...]:
        total = torch.logsumexp(logits, dim=-1)
        own = logits.gather(1, micro.labels[part, None]).squeeze(1) - total
        given = logits.gather(1, chosen[part]) - total[:, None]
        entropy = total - ((logits - total[:, None]).exp() * logits).sum(dim=-1)
        if everything:
            return own, given, torch.zeros_like(own), entropy
        others = logits.scatter(1, chosen[part], float("-inf"))
        return own, given, torch.logsumexp(others, dim=-1) - total, entropy

    labels, given, rest, entropies = policy(lambda: _in_chunks(policy, micro, of_logits))
    return CandidateScores(
        micro.scatter(labels),
        micro.scatter(given),
        None if everything else micro.scatter(rest),
        micro.scatter(entropies),
    )


def _in_chunks(policy: PolicyModel, micro: MicroBatch, of_logits: OfLogits) -> tuple[Tensor, ...]:
    """`of_logits` of every chunk of labels, put together; only inside the model's forward."""
    count = micro.labels.numel()
    if policy.fallback is not None:
        logits = policy.outputs(micro, whole=True).logits.flatten(0, 1)[micro.index]
        return of_logits(divided(logits, micro.temperature), slice(0, count))
    weight, bias = policy.head()
    hidden = policy.hidden(micro, micro.index).to(weight.dtype)

    def chunk(part: slice) -> tuple[Tensor, ...]:
        temperature = temperature_at(micro.temperature, part)
        return of_logits(scaled_logits(hidden[part], weight, bias, temperature), part)

    parts = _parts(count, chunk_length(policy.vocabulary, hidden.device))
    pieces = [
        checkpoint(chunk, part, use_reentrant=False, preserve_rng_state=False) for part in parts
    ]
    return tuple(torch.cat(column) for column in zip(*pieces, strict=True))


def _parts(count: int, length: int) -> Iterator[slice]:
    """Consecutive slices; an empty one where there is nothing, so that the head always takes
    part."""
    return (slice(at, min(at + length, count)) for at in range(0, max(count, 1), length))
