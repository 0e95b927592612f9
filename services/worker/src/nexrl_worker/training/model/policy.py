"""A language model that answers with log-probabilities instead of logits."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexrl_worker.training.batch.micro_batch import MicroBatch
from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.model.lm_head import active_chunks, chunk_length, divided, head_log_probs
from nexrl_worker.training.model.wrapper import ModelWrapper


class PolicyModel(ModelWrapper):
    """Wraps a Hugging Face causal LM. `fallback` says why its own logits are used instead of chunks
    of its head."""

    def __init__(self, hf: nn.Module) -> None:
        super().__init__(hf)
        head = hf.get_output_embeddings()  # type: ignore[operator]
        self.fallback: str | None = None
        if not isinstance(head, nn.Linear):
            self.fallback = "the output head is not a linear layer"
        elif not self.has_body:
            self.fallback = "the family has no model without its output head"
        self._head_dtype: torch.dtype | None = None

    def widen_head(self, dtype: torch.dtype) -> None:
        """Compute the head's product in at least `dtype`, on weights as they were gathered
        (`lm_head_dtype`).

        Costs one copy of the head in `dtype` while a micro-batch passes. Raises InvalidValue on a
        head of another kind.
        """
        head = self.hf.get_output_embeddings()  # type: ignore[operator]
        if not isinstance(head, nn.Linear):
            raise InvalidValue(
                "lm_head_dtype needs a model whose output head is a linear layer", expected="null"
            )
        self._head_dtype = dtype
        head.forward = partial(_wide_linear, head, dtype)  # type: ignore[method-assign]  # for the model's own logits

    @property
    def head_inputs(self) -> tuple[int, ...]:
        """Shape of what the head's linear layer takes for one token; none where it is another kind
        of layer."""
        head = self.hf.get_output_embeddings()  # type: ignore[operator]
        return (head.in_features,) if isinstance(head, nn.Linear) else ()

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V,H] and bias of the output head, in the dtype of its product; only inside
        `forward`."""
        head = self.hf.get_output_embeddings()  # type: ignore[operator]
        return _wide(head, self._head_dtype)

    def score(self, micro: MicroBatch, entropy: bool, all_labels: bool) -> tuple[Tensor, Tensor]:
        """(log-probabilities, entropies), both [n,R]; 0 at labels that are not attended.

        With `all_labels` every attended label is computed, else chunks without a scored one are
        skipped; the chunks are the same in both cases, and so are the bits.
        """
        length = chunk_length(self.vocabulary, micro.input_ids.device)
        wanted = torch.ones_like(micro.scored) if all_labels else micro.scored
        active = active_chunks(wanted, length)
        log_probs, entropies = self(lambda: self._flat(micro, length, active, entropy))
        return micro.scatter(log_probs), micro.scatter(entropies)

    def _flat(
        self, micro: MicroBatch, length: int, active: tuple[bool, ...], entropy: bool
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [T] of the micro-batch's labels."""
        if self.fallback is not None:
            logits = self.outputs(micro, whole=True).logits.flatten(0, 1)[micro.index]
            return _plain(divided(logits, micro.temperature), micro.labels)
        weight, bias = self.head()
        picked = self.hidden(micro, micro.index).to(weight.dtype)
        return head_log_probs(
            picked, weight, bias, micro.labels, micro.temperature, length, active, entropy
        )


def _wide(head: nn.Linear, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    wanted = head.weight.dtype if dtype is None else torch.promote_types(head.weight.dtype, dtype)
    return head.weight.to(wanted), None if head.bias is None else head.bias.to(wanted)


def _wide_linear(head: nn.Linear, dtype: torch.dtype, hidden: Tensor) -> Tensor:
    weight, bias = _wide(head, dtype)
    return F.linear(hidden.to(weight.dtype), weight, bias)


def _plain(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    log_probs = torch.log_softmax(logits, dim=-1)
    # Sums, not views: FSDP hooks its backward onto what the model returns.
    return log_probs.gather(1, labels[:, None]).sum(dim=1), -(log_probs.exp() * log_probs).sum(
        dim=-1
    )
