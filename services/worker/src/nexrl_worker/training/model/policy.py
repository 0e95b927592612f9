"""A language model that answers with log-probabilities instead of logits: of labels, of its most
likely tokens, and of given ones, without ever holding [T,V]."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nexrl_worker.training.batch.micro_batch import MicroBatch
from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.model.lm_head import (
    HeadCall,
    active_chunks,
    chunk_length,
    divided,
    head_log_probs,
    scaled_logits,
    temperature_at,
)
from nexrl_worker.training.model.wrapper import ModelWrapper

OfLogits = Callable[[Tensor, slice], tuple[Tensor, ...]]
"""Of logits [t,V] of some of the T labels, and which those are: values [t] or [t,K]."""


class PolicyModel(ModelWrapper):
    """Wraps a Hugging Face causal LM. `fallback` says why its own logits are used instead of chunks
    of its head."""

    def __init__(self, hf: nn.Module) -> None:
        super().__init__(hf)
        self.fallback: str | None = None
        if not isinstance(self._head, nn.Linear):
            self.fallback = "the output head is not a linear layer"
        elif not self.has_body:
            self.fallback = "the family has no model without its output head"
        self._head_dtype: torch.dtype | None = None

    @property
    def _head(self) -> nn.Module:
        head: nn.Module = self.hf.get_output_embeddings()  # type: ignore[operator]
        return head

    def widen_head(self, dtype: torch.dtype) -> None:
        """Compute the head's product in at least `dtype`, on weights as they were gathered
        (`lm_head_dtype`).

        Costs one copy of the head in `dtype` while a micro-batch passes. Raises InvalidValue on a
        head of another kind.
        """
        head = self._head
        if not isinstance(head, nn.Linear):
            raise InvalidValue(
                "lm_head_dtype needs a model whose output head is a linear layer", expected="null"
            )
        self._head_dtype = dtype
        # For the model's own logits.
        head.forward = partial(_wide_linear, head, dtype)  # type: ignore[method-assign]

    @property
    def head_inputs(self) -> tuple[int, ...]:
        """Shape of what a linear head takes for one token; () of another kind of head."""
        head = self._head
        return (head.in_features,) if isinstance(head, nn.Linear) else ()

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V,H] and bias [V] of the head, in its product's dtype; only inside `forward`."""
        return _wide(self._head, self._head_dtype)

    def score(self, micro: MicroBatch, entropy: bool, all_labels: bool) -> tuple[Tensor, Tensor]:
        """(log-probabilities, entropies), both [n,R]; 0 at labels that are not attended.

        With `all_labels` every attended label is computed, else chunks without a scored one are
        skipped; the chunks are the same in both cases, and so are the bits.
        """
        length = chunk_length(self.vocabulary, micro.input_ids.device)
        wanted = torch.ones_like(micro.scored) if all_labels else micro.scored
        active = active_chunks(wanted, length)
        call = HeadCall(micro.labels, micro.temperature, length, active, entropy)
        log_probs, entropies = self(lambda: self._flat(micro, call))
        return micro.scatter(log_probs), micro.scatter(entropies)

    def _flat(self, micro: MicroBatch, call: HeadCall) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [T] of the micro-batch's labels."""
        if self.fallback is not None:
            logs = torch.log_softmax(divided(self.own_logits(micro), micro.temperature), dim=-1)
            # Sums, not views: FSDP hooks its backward onto what the model returns.
            own = logs.gather(1, micro.labels[:, None]).sum(dim=1)
            return own, -(logs.exp() * logs).sum(dim=-1)
        weight, bias = self.head()
        return head_log_probs(self.hidden(micro).to(weight.dtype), weight, bias, call)


def _wide(head: nn.Module, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    assert isinstance(head, nn.Linear)
    wanted = head.weight.dtype if dtype is None else torch.promote_types(head.weight.dtype, dtype)
    return head.weight.to(wanted), None if head.bias is None else head.bias.to(wanted)


def _wide_linear(head: nn.Linear, dtype: torch.dtype, hidden: Tensor) -> Tensor:
    """Logits [...,V] of hidden states [...,H]."""
    weight, bias = _wide(head, dtype)
    return F.linear(hidden.to(weight.dtype), weight, bias)


# -- candidates: more than one token at every label


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
    """Labels' log-probabilities [n,R], the `k` most likely ids and theirs [n,R,K]; no gradients."""

    def of_logits(logits: Tensor, part: slice) -> tuple[Tensor, ...]:
        total = torch.logsumexp(logits, dim=-1)
        best = logits.topk(k, dim=-1)
        own = logits.gather(1, micro.labels[part, None]).squeeze(1)
        return own - total, best.indices, best.values - total[:, None]

    labels, ids, values = policy(lambda: _in_chunks(policy, micro, of_logits))
    return micro.scatter(labels), micro.scatter(ids), micro.scatter(values)


def score_candidates(policy: PolicyModel, micro: MicroBatch, ids: Tensor) -> CandidateScores:
    """Score `ids` [n,R,K] at every label; differentiable, the backward computes chunks again."""
    chosen = ids.flatten(0, 1)[micro.slots]  # [T,K]
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

    labels, given, rest, entropies = (
        micro.scatter(flat) for flat in policy(lambda: _in_chunks(policy, micro, of_logits))
    )
    return CandidateScores(labels, given, None if everything else rest, entropies)


def _in_chunks(policy: PolicyModel, micro: MicroBatch, of_logits: OfLogits) -> tuple[Tensor, ...]:
    """`of_logits` of every chunk of labels, put together; only inside the model's forward."""
    count = micro.labels.numel()
    if policy.fallback is not None:
        return of_logits(divided(policy.own_logits(micro), micro.temperature), slice(0, count))
    weight, bias = policy.head()
    hidden = policy.hidden(micro).to(weight.dtype)

    def chunk(part: slice) -> tuple[Tensor, ...]:
        temperature = temperature_at(micro.temperature, part)
        return of_logits(scaled_logits(hidden[part], weight, bias, temperature), part)

    parts = _parts(count, chunk_length(policy.vocabulary, hidden.device))
    pieces = [
        checkpoint(chunk, part, use_reentrant=False, preserve_rng_state=False) for part in parts
    ]
    return tuple(torch.cat(column) for column in zip(*pieces, strict=True))


def _parts(count: int, length: int) -> Iterator[slice]:
    """Consecutive slices; an empty one of nothing, so that the head always takes part."""
    return (slice(at, min(at + length, count)) for at in range(0, max(count, 1), length))
