"""From rows of a batch to the tensors of one micro-batch: alignment, masks, positions, trimmed padding.

Alignment: `log_probs[:, k]` belongs to `input_ids[:, S-R+k]` and is predicted at column S-R+k-1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nexrl_worker.training.errors import InvalidValue


class Rows(Protocol):
    """What a rank sees of a batch of `size` rows; reads only the rows asked for."""

    @property
    def size(self) -> int: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    def has(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def tensor(self, name: str, rows: Sequence[int] | slice) -> Tensor: ...


@dataclass(frozen=True)
class Layout:
    """Widths of a batch: S tokens a row, of which the last R can be scored."""

    sequence: int
    response: int

    @classmethod
    def of(cls, rows: Rows) -> Layout:
        """R is the width of `responses`, else S - 1; raises InvalidValue on shapes that do not fit."""
        if not rows.has("input_ids"):
            raise InvalidValue("the batch has no input_ids", tensor="input_ids", expected="[B,S] integers")
        shape = rows.shape("input_ids")
        if len(shape) != 2 or shape[1] < 2:
            raise _shape_error("input_ids", "[B,S] with S at least 2", shape)
        sequence = shape[1]
        response = sequence - 1
        if rows.has("responses"):
            answer = rows.shape("responses")
            if len(answer) != 2 or not 1 <= answer[1] < sequence:
                raise _shape_error("responses", f"[B,R] with R from 1 to {sequence - 1}", answer)
            response = answer[1]
        layout = cls(sequence, response)
        for name in ("attention_mask", "position_ids"):
            if rows.has(name) and rows.shape(name) != shape:
                raise _shape_error(name, str(list(shape)), rows.shape(name))
        for name in ("loss_mask", "scoring_attention_mask"):
            if rows.has(name):
                layout.check_aligned(rows, name)
        return layout

    def check_aligned(self, rows: Rows, name: str, per_row: bool = False) -> None:
        """Raise InvalidValue unless the tensor is [B,S] or [B,R] (or [B] where `per_row`)."""
        shape = rows.shape(name)
        fits = len(shape) == 2 and shape[1] in (self.sequence, self.response)
        if not fits and not (per_row and len(shape) == 1):
            expected = f"[B,{self.sequence}] or [B,{self.response}]" + (" or [B]" if per_row else "")
            raise _shape_error(name, expected, shape)

    def align(self, tensor: Tensor) -> Tensor:
        """[n,S], [n,R] or [n] as [n,R]."""
        if tensor.ndim == 1:
            return tensor[:, None].expand(-1, self.response)
        return tensor[:, -self.response :]


def _shape_error(name: str, expected: str, shape: tuple[int, ...]) -> InvalidValue:
    actual = str(list(shape))
    return InvalidValue(
        f"{name} has shape {actual}, expected {expected}", tensor=name, expected=expected, actual=actual
    )


@dataclass(frozen=True)
class Masks:
    """attention [n,S] and scored [n,R], both bool."""

    attention: Tensor
    scored: Tensor


def read_masks(rows: Rows, layout: Layout, indices: Sequence[int]) -> Masks:
    """scored is scoring_attention_mask, else loss_mask * attention_mask, else attention_mask, on the last R columns."""
    if rows.has("attention_mask"):
        attention = rows.tensor("attention_mask", indices) != 0
    else:
        attention = torch.ones(len(indices), layout.sequence, dtype=torch.bool)
    if rows.has("scoring_attention_mask"):
        return Masks(attention, layout.align(rows.tensor("scoring_attention_mask", indices)) != 0)
    scored = layout.align(attention)
    if rows.has("loss_mask"):
        scored = scored & (layout.align(rows.tensor("loss_mask", indices)) != 0)
    return Masks(attention, scored)


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch on the device, without the columns that are padding in all of its rows.

    Shapes: input_ids, attention_mask, position_ids [n,C]; index, labels, slots [T], one per attended label:
    `index` into [n*C] (the predicting column), `slots` into [n*R]; scored [T] bool on the CPU;
    mask [n,R] bool; values {name: [n,R]}.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    index: Tensor
    labels: Tensor
    slots: Tensor
    scored: Tensor
    mask: Tensor
    values: dict[str, Tensor]
    attended: int
    padded: int

    def scatter(self, flat: Tensor) -> Tensor:
        """Values of the T labels as [n,R], 0 elsewhere; differentiable."""
        full = flat.new_zeros(self.mask.numel())
        return full.index_put((self.slots,), flat).view(self.mask.shape)


@dataclass(frozen=True)
class BatchReader:
    """Reads micro-batches of one operation: `names` are the float tensors it needs, in `dtype`, on `device`."""

    rows: Rows
    layout: Layout
    names: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype

    def read(self, indices: Sequence[int]) -> MicroBatch:
        """The micro-batch of these rows; no rows give the dummy, one unscored row of two tokens."""
        if not indices:
            values = {name: torch.zeros(1, 1) for name in self.names}
            ones = torch.ones(1, 2, dtype=torch.bool)
            ids = torch.zeros(1, 2, dtype=torch.int64)
            return self._assemble(ids, Masks(ones, torch.zeros(1, 1, dtype=torch.bool)), None, values, real=False)
        indices = list(indices)
        masks = read_masks(self.rows, self.layout, indices)
        values = {name: self.layout.align(self.rows.tensor(name, indices)) for name in self.names}
        given = self.rows.tensor("position_ids", indices) if self.rows.has("position_ids") else None
        return self._assemble(self.rows.tensor("input_ids", indices), masks, given, values, real=True)

    def read_scored(self, indices: Sequence[int]) -> Tensor:
        """The scored mask [n,R] of these rows alone, bool on the CPU."""
        return read_masks(self.rows, self.layout, list(indices)).scored

    def _assemble(
        self, ids: Tensor, masks: Masks, given: Tensor | None, values: dict[str, Tensor], real: bool
    ) -> MicroBatch:
        count, width = ids.shape
        response = masks.scored.shape[1]
        needed = masks.attention.clone()
        needed[:, width - response :] |= masks.scored
        ids = torch.where(needed, ids.long(), 0)
        positions = (masks.attention.long().cumsum(dim=-1) - 1).clamp(min=0) if given is None else given.long()
        positions = torch.where(masks.attention, positions, 0)
        low, high = _columns(needed)
        # A row without any token still gets one, so that attention has something to normalise over.
        visible = masks.attention.clone()
        visible[~visible.any(dim=-1), low] = True
        where, k = needed[:, width - response :].nonzero(as_tuple=True)
        column = k + width - response
        return MicroBatch(
            input_ids=ids[:, low:high].to(self.device),
            attention_mask=visible[:, low:high].long().to(self.device),
            position_ids=positions[:, low:high].to(self.device),
            index=(where * (high - low) + column - 1 - low).to(self.device),
            labels=ids[where, column].to(self.device),
            slots=(where * response + k).to(self.device),
            scored=masks.scored[where, k],
            mask=masks.scored.to(self.device),
            values={name: value.to(self.device, self.dtype) for name, value in values.items()},
            attended=int(masks.attention.sum()) if real else 0,
            padded=count * (high - low),
        )


def _columns(needed: Tensor) -> tuple[int, int]:
    """First and one past the last column to compute: those needed by any row, and the one before them."""
    used = needed.any(dim=0).nonzero()
    if used.numel() == 0:
        return 0, 2
    low, high = max(int(used[0]) - 1, 0), int(used[-1]) + 1
    return low, max(high, low + 2)
