"""Finds out at `init_model` whether a family's log-probabilities may be computed in chunks of its head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nexrl_worker.training.batch import MicroBatch
from nexrl_worker.training.scorer import Scorer


@dataclass(frozen=True)
class Probe:
    """Outcome of comparing chunked log-probabilities with the model's own logits; reason None means they agree."""

    difference: float
    reason: str | None


_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_PEAK = 50.0


@torch.no_grad()
def probe(scorer: Scorer, device: torch.device, dtype: torch.dtype) -> Probe:
    """Compare both ways on a tiny input, with hidden states scaled up until the logits reach 50.

    Without the scaling a fresh model's small logits would hide a soft cap. Collective: every rank calls it.
    """
    micro = _tiny(scorer.vocabulary, device)
    known, scorer.fallback = scorer.fallback, "probe"
    captured: list[Tensor] = []
    watch = scorer.hf.register_forward_hook(lambda module, args, output: captured.append(output.logits))
    scorer.score(micro, 1.0, entropy=False, all_labels=True)
    watch.remove()
    if known is not None:
        return Probe(float("nan"), known)
    scale = _PEAK / max(float(captured[0].abs().max()), 1e-6)

    def enlarge(module: nn.Module, args: object, output: object) -> object:
        output.last_hidden_state = output.last_hidden_state * scale  # type: ignore[attr-defined]
        return output

    hook = scorer.hf.base_model.register_forward_hook(enlarge)  # type: ignore[union-attr]
    own, _ = scorer.score(micro, 1.0, entropy=False, all_labels=True)  # the family's own logits: fallback is still set
    scorer.fallback = None
    chunked, _ = scorer.score(micro, 1.0, entropy=False, all_labels=True)
    hook.remove()
    difference = float((own - chunked).abs().max())
    if difference <= _TOLERANCE.get(dtype, 1e-2) * _PEAK:
        return Probe(difference, None)
    reason = f"the model's own logits differ from its linear head by {difference:.2g} (scaled or capped logits)"
    return Probe(difference, reason)


def _tiny(vocabulary: int, device: torch.device) -> MicroBatch:
    """One row of nine random tokens, of which all but the first are labels."""
    ids = torch.randint(0, vocabulary, (1, 9), generator=torch.Generator().manual_seed(0)).to(device)
    places = torch.arange(9, device=device)
    return MicroBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=places[None],
        index=places[:8],
        labels=ids[0, 1:],
        slots=places[:8],
        scored=torch.ones(8, dtype=torch.bool),
        mask=torch.ones(1, 8, dtype=torch.bool, device=device),
        values={},
        attended=9,
        padded=9,
    )
