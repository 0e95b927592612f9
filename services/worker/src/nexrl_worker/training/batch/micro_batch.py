"""From rows of a batch to the tensors of one micro-batch: aligned, masked, trimmed or packed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from nexrl_worker.training.batch.layout import (
    Layout,
    Masks,
    Rows,
    RowsInMemory,
    predictable,
    read_masks,
)
from nexrl_worker.training.batch.packing import Segments, send
from nexrl_worker.training.losses.aggregation import Correction


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch on the device: n rows, padded behind to the longest, or one packed stream of
    them.

    Shapes: input_ids, attention_mask, position_ids [n,C]; packed: [1,C], the mask None, and
    `segments` the rows that hold tokens. index, labels, slots [T], one per attended label: `index`
    into the flat layout (the predicting token), `slots` into [n*R]; scored [T] bool on the CPU,
    `chosen` the slots of the scored; last [n] the flat place of each row's last token (-1 for a row
    without any); mask [n,R] bool; values {name: [n,R]}. `padded` counts the tokens computed,
    `attended` the real ones. `dropped` [n,R] bool: what would be in the mask but for a rollout
    correction. `temperature` divides logits: one number, or one for each label [T].
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor
    index: Tensor
    labels: Tensor
    slots: Tensor
    scored: Tensor
    chosen: Tensor
    last: Tensor
    mask: Tensor
    values: dict[str, Tensor]
    attended: int
    padded: int
    segments: Segments | None = None
    dropped: Tensor | None = None
    temperature: float | Tensor = 1.0

    def scatter(self, flat: Tensor) -> Tensor:
        """Values [T,...] of the labels as [n,R,...], 0 elsewhere; differentiable."""
        full = flat.new_zeros(self.mask.numel(), *flat.shape[1:])
        return full.index_put((self.slots,), flat).view(*self.mask.shape, *flat.shape[1:])


@dataclass(frozen=True)
class BatchReader:
    """Reads micro-batches of one operation: `names` are the float tensors it needs, in `dtype`, on
    `device`.

    `packed` makes one stream of a micro-batch's attended tokens; the model's attention must then be
    that of packing. What `dropping` rejects is not scored: known from the batch alone, it is the
    same however the work is cut. `temperature` is that of rows without one of their own, the tensor
    `temperature` [B].
    """

    rows: Rows
    layout: Layout
    names: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    packed: bool = False
    dropping: Correction | None = None
    temperature: float = 1.0

    def read(self, indices: Sequence[int]) -> MicroBatch:
        """The micro-batch of these rows; no rows give the dummy, one unscored row of two tokens."""
        if not indices:
            # [1,1] or [1,1,K] each.
            nothing = {name: torch.zeros(1, 1, *self.rows.shape(name)[2:]) for name in self.names}
            masks = Masks(torch.ones(1, 2).bool(), torch.zeros(1, 1).bool())
            dummy = self._assemble(torch.zeros(1, 2).long(), masks, nothing)
            return replace(dummy, attended=0)
        indices = list(indices)
        masks = read_masks(self.rows, self.layout, indices)
        values = {name: self.layout.align(self.rows.tensor(name, indices)) for name in self.names}
        given = self.rows.tensor("position_ids", indices) if self.rows.has("position_ids") else None
        kept = self._kept(masks.scored, indices)
        ids = self.rows.tensor("input_ids", indices)
        temperatures = self._temperatures(indices)
        micro = self._assemble(ids, Masks(masks.attention, kept), values, given, temperatures)
        if self.dropping is None:
            return micro
        return replace(micro, dropped=send(masks.scored & ~kept, self.device))

    def read_scored(self, indices: Sequence[int]) -> Tensor:
        """The scored mask [n,R] of these rows alone, bool on the CPU."""
        return self._kept(read_masks(self.rows, self.layout, list(indices)).scored, list(indices))

    def _kept(self, scored: Tensor, indices: list[int]) -> Tensor:
        """The scored mask [n,R] without what is dropped."""
        if self.dropping is None:
            return scored
        names = ("old_log_probs", "rollout_log_probs")
        given = (self.layout.align(self.rows.tensor(name, indices)) for name in names)
        old, rollout = (values.to(self.dtype) for values in given)
        return self.dropping.kept(old, rollout, scored)

    def _temperatures(self, indices: list[int]) -> Tensor | None:
        """Of every row [n]; 1 where a row's is no temperature: nothing scored reads that."""
        if not self.rows.has("temperature"):
            return None
        given = self.rows.tensor("temperature", indices).to(self.dtype)
        return torch.where(torch.isfinite(given) & (given > 0), given, 1.0)

    def _place(self, name: str, value: Tensor) -> Tensor:
        """Values [n,R] or [n,R,K] on the device; ids stay integers, all else is in the reader's
        dtype."""
        return send(value.to(torch.int64 if name.endswith("_ids") else self.dtype), self.device)

    def _assemble(
        self,
        ids: Tensor,
        masks: Masks,
        values: dict[str, Tensor],
        given: Tensor | None = None,
        temperatures: Tensor | None = None,
    ) -> MicroBatch:
        """Of ids [n,S], values {name: [n,R]}, `given` positions [n,S] and temperatures [n]."""
        attention, response = masks.attention, masks.scored.shape[1]
        first = ids.shape[1] - response
        labelled = (attention[:, first:] | masks.scored) & predictable(attention)[:, first:]
        row, k = labelled.nonzero(as_tuple=True)  # [T] each
        counted = (attention.long().cumsum(dim=-1) - 1).clamp(min=0)
        positions = counted if given is None else given.long()
        inputs = (_pack if self.packed else _trim)(ids, attention, positions)
        columns = torch.arange(ids.shape[1]).expand_as(ids)
        latest = torch.where(attention, columns, 0).cummax(dim=-1).values
        ends = inputs.places.gather(1, latest[:, -1:]).squeeze(1)
        slots, scored = row * response + k, masks.scored[row, k]
        temperature = None if temperatures is None else send(temperatures[row], self.device)
        return MicroBatch(
            input_ids=send(inputs.ids, self.device),
            attention_mask=None if self.packed else send(inputs.visible.long(), self.device),
            position_ids=send(inputs.positions, self.device),
            index=send(inputs.places[row, latest[row, k + first - 1]], self.device),
            labels=send(ids[row, k + first].long(), self.device),
            slots=send(slots, self.device),
            scored=scored,
            chosen=send(slots[scored], self.device),
            last=send(torch.where(attention.any(dim=-1), ends, -1), self.device),
            mask=send(masks.scored, self.device),
            values={name: self._place(name, value) for name, value in values.items()},
            attended=int(attention.sum()),
            padded=inputs.ids.numel(),
            segments=Segments(inputs.lengths, self.device) if self.packed else None,
            temperature=self.temperature if temperature is None else temperature,
        )


class _Inputs(NamedTuple):
    """What the model sees: [n,C] or [1,C] each; `places` [n,S] of tokens in it, 0 without one."""

    ids: Tensor
    visible: Tensor
    positions: Tensor
    places: Tensor
    lengths: tuple[int, ...]


def _trim(ids: Tensor, attention: Tensor, positions: Tensor) -> _Inputs:
    """Rows of ids, attention and positions [n,S] with their attended tokens first, as wide as the
    longest: the same on whichever side they were padded.

    A row without any token still shows one, so that attention has something to normalise over.
    """
    counts = attention.sum(dim=-1, keepdim=True)
    width = max(int(counts.max()), 1)
    starts = torch.arange(len(ids))[:, None] * width
    places = torch.where(attention, starts + attention.cumsum(dim=-1) - 1, 0)

    def moved(values: Tensor) -> Tensor:
        """Values [n,S] at their places [n,width]."""
        flat = torch.zeros(len(ids) * width, dtype=torch.int64)
        return flat.index_put((places[attention],), values[attention].long()).view(-1, width)

    visible = torch.arange(width) < counts.clamp(min=1)
    return _Inputs(moved(ids), visible, moved(positions), places, (width,) * len(ids))


def _pack(ids: Tensor, attention: Tensor, positions: Tensor) -> _Inputs:
    """The attended tokens of ids, attention and positions [n,S], one row after the other; without
    any, one token that nobody reads."""
    counts = [count for count in attention.sum(dim=-1).tolist() if count]
    places = torch.where(attention, attention.flatten().cumsum(dim=0).view_as(attention) - 1, 0)
    if not counts:
        nothing = torch.zeros(1, 1, dtype=torch.int64)
        return _Inputs(nothing, nothing == 0, nothing, places, (1,))
    shown, placed = ids.long()[attention][None], positions[attention][None]
    return _Inputs(shown, torch.ones_like(shown, dtype=torch.bool), placed, places, tuple(counts))


class TinyRows(RowsInMemory):
    """Right-padded rows of these lengths, all tokens attended; the same ones at every call.

    Ids to `avoid` do not occur, unless there are no others; the second row ends in `end`.
    """

    def __init__(
        self,
        vocabulary: int,
        lengths: Sequence[int],
        avoid: Collection[int] = (),
        end: int | None = None,
    ) -> None:
        columns = torch.arange(max(lengths))
        random = torch.Generator().manual_seed(0)
        allowed = torch.tensor([token for token in range(vocabulary) if token not in avoid] or [0])
        size = (len(lengths), len(columns))
        ids = allowed[torch.randint(0, len(allowed), size, generator=random)]
        if end is not None:
            ids[1, lengths[1] - 1] = end
        attended = (columns < torch.tensor(list(lengths))[:, None]).long()
        super().__init__({"input_ids": ids, "attention_mask": attended})

    def micro_batch(
        self, device: torch.device, packed: bool = False, dtype: torch.dtype = torch.float32
    ) -> MicroBatch:
        """All rows, side by side or packed into one stream."""
        return BatchReader(self, Layout.of(self), (), device, dtype, packed).read(range(self.size))
