"""A language model that answers with log-probabilities instead of logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nexrl_worker.training.batch import MicroBatch
from nexrl_worker.training.chunked import active_chunks, chunk_length, head_log_probs
from nexrl_worker.training.roots import Root


class Scorer(Root):
    """Wraps a Hugging Face causal LM. `fallback` says why its own logits are used instead of chunks of its head."""

    def __init__(self, hf: nn.Module) -> None:
        super().__init__(hf)
        head = hf.get_output_embeddings()  # type: ignore[operator]
        self.fallback: str | None = None if isinstance(head, nn.Linear) else "the output head is not a linear layer"

    def score(self, micro: MicroBatch, temperature: float, entropy: bool, all_labels: bool) -> tuple[Tensor, Tensor]:
        """(log-probabilities, entropies), both [n,R]; 0 at labels that are not attended.

        With `all_labels` every attended label is computed, else chunks without a scored one are skipped; the
        chunks are the same in both cases, and so are the bits.
        """
        length = chunk_length(self.vocabulary, micro.input_ids.device)
        wanted = torch.ones_like(micro.scored) if all_labels else micro.scored
        active = active_chunks(wanted, length)
        log_probs, entropies = self(lambda: self._flat(micro, temperature, length, active, entropy))
        return micro.scatter(log_probs), micro.scatter(entropies)

    def _flat(
        self, micro: MicroBatch, temperature: float, length: int, active: tuple[bool, ...], entropy: bool
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [T] of the micro-batch's labels."""
        if self.fallback is not None:
            logits = self.outputs(micro, whole=True).logits.flatten(0, 1)[micro.index]
            return _plain(logits, micro.labels, temperature)
        head = self.hf.get_output_embeddings()  # type: ignore[operator]
        picked = self.hidden(micro, micro.index).to(head.weight.dtype)
        return head_log_probs(picked, head.weight, head.bias, micro.labels, temperature, length, active, entropy)


def _plain(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    wide = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    log_probs = torch.log_softmax(wide, dim=-1)
    # Sums, not views: FSDP hooks its backward onto what the root returns.
    return log_probs.gather(1, labels[:, None]).sum(dim=1), -(log_probs.exp() * log_probs).sum(dim=-1)
