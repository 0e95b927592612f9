"""Rotary positions: frequencies that go by a row's length, and how many positions a row has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nexrl_worker.training.batch.packing import Segments
from nexrl_worker.training.transformers_parts import text_config


class Rotations:
    """Rotations whose frequencies go by the longest position (`dynamic`, `longrope`), for each row
    by its own.

    transformers takes the longest of all rows, and `dynamic` remembers those before: a row's
    numbers would depend on its neighbours and on the cut. Here each row gets what the model gives
    to that row alone when it is new.
    """

    def __init__(self, hf: nn.Module) -> None:
        self._attention: Tensor | None = None
        self._segments: Segments | None = None
        for part in list(hf.modules()):
            kinds = getattr(part, "rope_type", None)
            if any(map(_by_length, kinds.values() if isinstance(kinds, dict) else [kinds])):
                part.forward = partial(self._rotate, part, part.forward)

    def are(self, attention: Tensor | None, segments: Segments | None) -> None:
        """What the next forward's rows are: [n,C] attended, or segments of one stream; else all of
        the positions."""
        self._attention, self._segments = attention, segments

    @torch.no_grad()
    def _rotate(
        self,
        part: Any,
        own: Callable[..., Any],
        x: Tensor,
        position_ids: Tensor,
        layer_type: str | None = None,
    ) -> Any:
        """cos and sin [n,C,D], or what the family makes, of positions [n,C] or [1,C], by `own`."""
        kind = part.rope_type if layer_type is None else part.rope_type[layer_type]
        more = {} if layer_type is None else {"layer_type": layer_type}
        if not _by_length(kind):
            return own(x, position_ids, **more)
        positions = position_ids
        if self._attention is not None:  # padding makes no row longer
            positions = torch.where(self._attention.bool(), positions, 0)
        turns = self._lengths(positions)
        if kind == "longrope":
            known = part.config.rope_parameters
            known = known if layer_type is None else known[layer_type]
            turns = (turns > known["original_max_position_embeddings"]).long()
        else:
            turns = turns.clamp(min=part.config.max_position_embeddings)
        different = sorted(set(turns.flatten().tolist()))
        if len(different) == 1:
            _forget(part, kind, layer_type)
            return own(x, positions, **more)
        parts: list[tuple[Tensor, ...]] = []
        places = [turns == one for one in different]
        for place in places:
            _forget(part, kind, layer_type)
            found = own(x, positions[place][None], **more)
            parts.append(found if isinstance(found, tuple) else (found,))
        answers = []
        for pieces in zip(*parts, strict=True):
            answer = pieces[0].new_empty(*positions.shape, *pieces[0].shape[2:])
            for place, piece in zip(places, pieces, strict=True):
                answer[place] = piece[0]
            answers.append(answer)
        return tuple(answers) if isinstance(found, tuple) else answers[0]

    def _lengths(self, positions: Tensor) -> Tensor:
        """At every token the length of its row, the furthest position and one: [n,C]."""
        if self._segments is None:
            return (positions.amax(dim=-1, keepdim=True) + 1).expand_as(positions)
        lengths = torch.tensor(self._segments.lengths)
        row = torch.arange(len(lengths)).repeat_interleave(lengths).to(positions.device)
        furthest = positions.new_zeros(len(lengths)).scatter_reduce(0, row, positions[0], "amax")
        return (furthest + 1)[row][None]


def _by_length(kind: Any) -> bool:
    """Whether transformers computes this kind of rotation by the length of what it sees."""
    return isinstance(kind, str) and ("dynamic" in kind or kind == "longrope")


def _forget(part: Any, kind: str, layer_type: str | None) -> None:
    """Put a `dynamic` rotation back to before it met a longer row; `longrope` chooses anew."""
    if kind != "longrope":
        prefix = "" if layer_type is None else f"{layer_type}_"
        setattr(part, f"{prefix}inv_freq", getattr(part, f"{prefix}original_inv_freq"))
        setattr(part, f"{prefix}max_seq_len_cached", part.original_max_seq_len)


def longest_row(hf: nn.Module) -> int | None:
    """How many positions a row has at the most, as the model was made; None where nothing says so.

    Rotations that are stretched reach as far as their original length times the factor, and never
    less far than the configuration says. A bias by distance (ALiBi) knows no end.
    """
    config = text_config(hf)
    most = getattr(config, "max_position_embeddings", None)
    if most is None or most < 1 or getattr(config, "alibi", False):  # XLNet says -1
        return None
    reached = [_reach(one, int(most)) for one in _rotations(hf)]
    return max(int(most), min(reached, default=int(most)))


def position_limit(hf: nn.Module) -> int | None:
    """How many positions a row may have: `longest_row`; plain rotations have no end."""
    kinds = _rotations(hf)
    tables = (name for name, part in hf.named_modules() if isinstance(part, nn.Embedding))
    plain = kinds and all(one.get("rope_type", "default") == "default" for one in kinds)
    return None if plain and not any("position" in name for name in tables) else longest_row(hf)


def _rotations(hf: nn.Module) -> list[dict[str, Any]]:
    """What the configuration says of rotations, of layers that see a whole row if some do not."""
    config = text_config(hf)
    known = getattr(config, "rope_parameters", None)
    if not known or not any(hasattr(part, "rope_type") for part in hf.modules()):
        return []
    if isinstance(known.get("full_attention"), dict):
        return [known["full_attention"]]
    return (
        [known]
        if "rope_type" in known
        else [one for one in known.values() if isinstance(one, dict)]
    )


def _reach(rope: dict[str, Any], most: int) -> int:
    """As far as these rotations are stretched: their original length times the factor."""
    return int((rope.get("original_max_position_embeddings") or most) * (rope.get("factor") or 1.0))
