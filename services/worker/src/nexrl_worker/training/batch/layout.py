"""A batch as a rank sees it: its rows, their widths, and which of their tokens are scored.

Alignment: `log_probs[:, k]` belongs to `input_ids[:, S-R+k]` and is predicted at the last attended
column before it. A row's first attended token has none: it is no label, on whichever side the row
is padded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nexrl_contract.tensors import Described, sizes_of
from tensor_codec import encode, parse_header
from torch import Tensor


class Rows:
    """What a rank sees of a batch of `size` rows, by its header; reads only the rows asked for."""

    size: int
    metadata: Mapping[str, Any]
    header: Mapping[str, Described]

    def has(self, name: str) -> bool:
        """Whether the batch holds that tensor."""
        return name in self.header

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole batch's shape of one tensor."""
        return tuple(self.header[name].shape)

    def tensor(self, name: str, rows: Sequence[int] | slice) -> Tensor:
        """[len(rows), ...] on the CPU."""
        raise NotImplementedError


class RowsInMemory(Rows):
    """A batch of tensors at hand."""

    def __init__(
        self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
    ) -> None:
        self.tensors = tensors
        self.metadata = metadata or {}
        self.size = len(tensors["input_ids"])
        frame = encode(dict(tensors))
        self.header = parse_header(frame.header, frame.nbytes).tensors

    def tensor(self, name: str, rows: Sequence[int] | slice) -> Tensor:
        return self.tensors[name][rows]


@dataclass(frozen=True)
class Layout:
    """Widths of a batch: S tokens a row, of which the last R can be scored."""

    sequence: int
    response: int

    @classmethod
    def of(cls, rows: Rows) -> Layout:
        """R is the width of `responses`, else S - 1; raises INVALID_TENSOR where they have none."""
        _, sequence, response = sizes_of(rows.header)
        return cls(sequence, response)

    def align(self, tensor: Tensor) -> Tensor:
        """[n,S], [n,R] or [n] as [n,R]; [n,R,K] as it is."""
        if tensor.ndim == 1:
            return tensor[:, None].expand(-1, self.response)
        return tensor[:, -self.response :]


@dataclass(frozen=True)
class Masks:
    """attention [n,S] and scored [n,R], both bool."""

    attention: Tensor
    scored: Tensor


def read_masks(rows: Rows, layout: Layout, indices: Sequence[int]) -> Masks:
    """scored is scoring_attention_mask, else loss_mask * attention_mask, else attention_mask, on
    the last R columns.

    What no attended token precedes cannot be predicted, and is never scored.
    """
    if rows.has("attention_mask"):
        attention = rows.tensor("attention_mask", indices) != 0
    else:
        attention = torch.ones(len(indices), layout.sequence, dtype=torch.bool)
    possible = layout.align(predictable(attention))
    if rows.has("scoring_attention_mask"):
        given = layout.align(rows.tensor("scoring_attention_mask", indices)) != 0
        return Masks(attention, possible & given)
    scored = possible & layout.align(attention)
    if rows.has("loss_mask"):
        scored = scored & (layout.align(rows.tensor("loss_mask", indices)) != 0)
    return Masks(attention, scored)


def predictable(attention: Tensor) -> Tensor:
    """Where an attended token stands before, bool [n,S], of attention [n,S]."""
    return attention.cumsum(dim=-1) > attention.long()
