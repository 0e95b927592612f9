"""The root module of every group: a language model that answers with log-probabilities instead of logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nexrl_worker.training.batch import MicroBatch
from nexrl_worker.training.chunked import active_chunks, chunk_length, head_log_probs


@dataclass(frozen=True)
class Probe:
    """Outcome of comparing chunked log-probabilities with the model's own logits; reason None means they agree."""

    difference: float
    reason: str | None


class Scorer(nn.Module):
    """Wraps a Hugging Face causal LM `hf`. Its LM head runs in here, so head and embedding belong to the root."""

    def __init__(self, hf: nn.Module) -> None:
        super().__init__()
        self.hf = hf
        head = hf.get_output_embeddings()  # type: ignore[operator]
        self.fallback: str | None = None if isinstance(head, nn.Linear) else "the output head is not a linear layer"

    @property
    def vocabulary(self) -> int:
        return int(self.hf.config.vocab_size)  # type: ignore[union-attr, arg-type]

    def score(self, micro: MicroBatch, temperature: float, entropy: bool, all_labels: bool) -> tuple[Tensor, Tensor]:
        """(log-probabilities, entropies), both [n,R]; 0 at labels that are not attended.

        With `all_labels` every attended label is computed, else chunks without a scored one are skipped; the
        chunks are the same in both cases, and so are the bits.
        """
        length = chunk_length(self.vocabulary, micro.input_ids.device)
        wanted = torch.ones_like(micro.scored) if all_labels else micro.scored
        log_probs, entropies = self(
            micro.input_ids,
            micro.attention_mask,
            micro.position_ids,
            micro.index,
            micro.labels,
            temperature,
            length,
            active_chunks(wanted, length),
            entropy,
        )
        return micro.scatter(log_probs), micro.scatter(entropies)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        index: Tensor,
        labels: Tensor,
        temperature: float,
        length: int,
        active: tuple[bool, ...],
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [T] of `labels`, predicted at the flat positions `index`."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        if self.fallback is not None:
            logits = self.hf(**inputs, use_cache=False).logits.flatten(0, 1)[index]
            return _plain(logits, labels, temperature)
        hidden = self.hf.base_model(**inputs, use_cache=False).last_hidden_state  # type: ignore[operator]
        head = self.hf.get_output_embeddings()  # type: ignore[operator]
        picked = hidden.flatten(0, 1)[index].to(head.weight.dtype)
        return head_log_probs(picked, head.weight, head.bias, labels, temperature, length, active, entropy)


def _plain(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    wide = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    log_probs = torch.log_softmax(wide, dim=-1)
    # Sums, not views: FSDP hooks its backward onto what the root returns.
    return log_probs.gather(1, labels[:, None]).sum(dim=1), -(log_probs.exp() * log_probs).sum(dim=-1)


_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_PEAK = 50.0


@torch.no_grad()
def probe(scorer: Scorer, device: torch.device, dtype: torch.dtype) -> Probe:
    """Compare both ways on a tiny input, with hidden states scaled up until the logits reach 50.

    Without the scaling a fresh model's small logits would hide a soft cap. Collective: every rank calls it.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, scorer.vocabulary, (1, 9), generator=generator).to(device)
    positions = torch.arange(9, device=device)[None]
    arguments = (ids, torch.ones_like(ids), positions, positions[0, :-1], ids[0, 1:], 1.0, 9, (True,), False)
    known, scorer.fallback = scorer.fallback, "probe"
    captured: list[Tensor] = []
    watch = scorer.hf.register_forward_hook(lambda module, args, output: captured.append(output.logits))
    scorer(*arguments)
    watch.remove()
    if known is not None:
        return Probe(float("nan"), known)
    scale = _PEAK / max(float(captured[0].abs().max()), 1e-6)

    def enlarge(module: nn.Module, args: object, output: object) -> object:
        output.last_hidden_state = output.last_hidden_state * scale  # type: ignore[attr-defined]
        return output

    hook = scorer.hf.base_model.register_forward_hook(enlarge)  # type: ignore[union-attr]
    own, _ = scorer(*arguments)  # the family's own logits: fallback is still set
    scorer.fallback = None
    chunked, _ = scorer(*arguments)
    hook.remove()
    difference = float((own - chunked).abs().max())
    if difference <= _TOLERANCE.get(dtype, 1e-2) * _PEAK:
        return Probe(difference, None)
    reason = f"the model's own logits differ from its linear head by {difference:.2g} (scaled or capped logits)"
    return Probe(difference, reason)
