"""Log-probabilities and entropies straight from hidden states: the LM head in chunks of tokens,
never [T,V] at once.

Liger's and Apple's chunked heads have neither entropies nor float64;
tests/training/test_kept_logits.py and test_parts.py compare this one with the plain formula.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Temperature = float | Tensor
"""What logits are divided by: one number, or one for each token [T]."""

# Elements of one chunk's logits: large enough for a fast matrix product, small enough to stay a
# side note in memory.
_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}
# Elements of logits kept for the backward, which computes the others again: on CPU 32 MiB save a
# small model a product.
_KEPT = {"cpu": 1 << 23}


def chunk_length(vocabulary: int, device: torch.device) -> int:
    """Tokens per chunk: by model and device alone, so that every operation cuts alike."""
    return max(_ELEMENTS.get(device.type, 1 << 22) // vocabulary, 1)


def head_bytes(tokens: int, vocabulary: int, device: torch.device, trains: bool) -> int:
    """The most bytes of float32 logits at once: a chunk, its exponentials, and those kept."""
    chunk = min(tokens, chunk_length(vocabulary, device)) * vocabulary
    kept = min(_KEPT.get(device.type, 0), tokens * vocabulary) if trains else 0
    return 4 * (2 * chunk + kept)


def active_chunks(wanted: Tensor, length: int) -> tuple[bool, ...]:
    """Which chunks hold a wanted label (bool [T] on the CPU); the others are not computed."""
    return tuple(bool(wanted[at : at + length].any()) for at in range(0, wanted.numel(), length))


def at_least_float32(values: Tensor) -> Tensor:
    """The values, in float32 unless they are in float64."""
    return values if values.dtype == torch.float64 else values.float()


@dataclass(frozen=True)
class HeadCall:
    """How the head is computed for T tokens, in chunks of `length`: `active` says which chunks are
    computed at all, `entropy` whether entropies are asked for."""

    labels: Tensor
    temperature: Temperature
    length: int
    active: tuple[bool, ...]
    entropy: bool

    def parts(self) -> Iterator[slice]:
        """The active chunks, as slices of the tokens."""
        for number, used in enumerate(self.active):
            if used:
                end = min((number + 1) * self.length, self.labels.shape[0])
                yield slice(number * self.length, end)


def head_log_probs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, call: HeadCall
) -> tuple[Tensor, Tensor]:
    """(log p(label), entropy) of softmax((hidden W^T + b) / temperature), each [T], at least
    float32.

    Shapes: hidden [T,H], weight [V,H], bias [V]. Entropies are 0 unless asked for, and so is all of
    an inactive chunk. Gradients reach hidden, weight and bias; the backward computes again what
    logits were not kept.
    """
    result: tuple[Tensor, Tensor] = _HeadLogProbs.apply(hidden, weight, bias, call)  # type: ignore[no-untyped-call]
    return result


def scaled_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Temperature
) -> Tensor:
    """(hidden [T,H] W^T + b) / temperature: [T,V], at least float32."""
    return cooled(F.linear(hidden, weight, bias).to(_wide(hidden)), temperature)


def cooled(logits: Tensor, temperature: Temperature) -> Tensor:
    """The logits [T,V] divided in place by the temperature, a number or [T]."""
    if isinstance(temperature, Tensor):
        return logits.div_(temperature[:, None])
    return logits if temperature == 1.0 else logits.div_(temperature)


def divided(logits: Tensor, temperature: Temperature) -> Tensor:
    """A family's own logits [T,V] over the temperature, at least float32; differentiable."""
    by = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    return at_least_float32(logits) / by


def temperature_at(temperature: Temperature, part: slice) -> Temperature:
    """Of some of the tokens."""
    return temperature[part] if isinstance(temperature, Tensor) else temperature


def _fill_logits(
    into: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Temperature
) -> Tensor:
    """`scaled_logits`, outside autograd, in memory [T,V] that is there already."""
    if into.dtype != weight.dtype:
        into.copy_(F.linear(hidden, weight, bias))
    elif bias is None:
        torch.mm(hidden, weight.t(), out=into)
    else:
        torch.addmm(bias, hidden, weight.t(), out=into)
    return cooled(into, temperature)


def _wide(hidden: Tensor) -> torch.dtype:
    """What logits of hidden states [T,H] are computed with: at least float32."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _workspace(hidden: Tensor, weight: Tensor, length: int) -> Tensor:
    """Room for two chunks of logits [2,T,V], used by one chunk after the other.

    Made and freed for each, they would take several times as much wherever the allocator leaves
    gaps between them.
    """
    rows = min(length, hidden.shape[0])
    return torch.empty(2, rows, weight.shape[0], dtype=_wide(hidden), device=hidden.device)


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: HeadCall
    ) -> tuple[Tensor, Tensor]:
        log_probs, normaliser, entropies = (
            hidden.new_zeros(hidden.shape[0], dtype=_wide(hidden)) for _ in range(3)
        )
        kept: dict[int, Tensor] = {}
        room = _KEPT.get(hidden.device.type, 0)
        workspace = _workspace(hidden, weight, call.length)
        for part in call.parts():
            temperature, labels = temperature_at(call.temperature, part), call.labels[part, None]
            logits, powers = workspace[:, : part.stop - part.start]
            if logits.numel() <= room:
                kept[part.start] = logits = torch.empty_like(logits)
                room -= logits.numel()
            _fill_logits(logits, hidden[part], weight, bias, temperature)
            highest = logits.amax(dim=-1, keepdim=True)
            mass = torch.sub(logits, highest, out=powers).exp_().sum(dim=-1)
            total = highest.squeeze(1) + mass.log()
            log_probs[part] = logits.gather(1, labels).squeeze(1) - total
            normaliser[part] = total
            if call.entropy:
                entropies[part] = total - powers.mul_(logits).sum(dim=-1) / mass
        ctx.save_for_backward(hidden, weight, bias, normaliser, entropies.clone())
        ctx.call, ctx.kept = call, kept
        ctx.set_materialize_grads(False)
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        by_log_prob, by_entropy = grads
        hidden, weight, bias, normaliser, entropies = ctx.saved_tensors
        call, wide = ctx.call, _wide(hidden)
        hidden_grad = torch.zeros_like(hidden)
        weight_grad = torch.zeros(weight.shape, dtype=wide, device=weight.device)
        bias_grad = None if bias is None else torch.zeros_like(bias, dtype=wide)
        workspace = _workspace(hidden, weight, call.length)
        for part in call.parts():
            temperature, labels = temperature_at(call.temperature, part), call.labels[part, None]
            room, shares = workspace[:, : part.stop - part.start]
            # Used up below: a second backward computes it again.
            logits = ctx.kept.pop(part.start, None)
            if logits is None:
                logits = _fill_logits(room, hidden[part], weight, bias, temperature)
            centred = logits.sub_(normaliser[part, None])
            torch.exp(centred, out=shares)
            if by_entropy is not None:  # dH/dz = -p (log p + H)
                grad = centred.add_(entropies[part, None]).mul_(shares)
                grad.mul_(-by_entropy[part, None])
                if by_log_prob is not None:
                    grad.addcmul_(shares, by_log_prob[part, None], value=-1.0)
            elif by_log_prob is not None:
                grad = shares.mul_(-by_log_prob[part, None])
            else:
                continue
            if by_log_prob is not None:  # dlp/dz = [z is the label's] - p
                grad.scatter_add_(1, labels, by_log_prob[part, None])
            grad = cooled(grad, temperature).to(weight.dtype)
            hidden_grad[part] = grad @ weight
            if wide == weight.dtype:
                weight_grad.addmm_(grad.t(), hidden[part])
            else:
                weight_grad.add_(grad.t() @ hidden[part])
            if bias_grad is not None:
                bias_grad.add_(grad.sum(dim=0))
        last = None if bias_grad is None else bias_grad.to(bias.dtype)
        return hidden_grad, weight_grad.to(weight.dtype), last, None
