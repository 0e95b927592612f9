"""A batch of random tokens, for what a model shows on little work."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from nexrl_worker.training.batch import BatchReader, Layout, MicroBatch


class TinyRows:
    """Right-padded rows of these lengths, all tokens attended; the same ones at every call.

    Ids to `avoid` do not occur, unless there are no others; the second row ends in `end`.
    """

    def __init__(
        self, vocabulary: int, lengths: Sequence[int], avoid: Collection[int] = (), end: int | None = None
    ) -> None:
        columns = torch.arange(max(lengths))
        random = torch.Generator().manual_seed(0)
        self.size = len(lengths)
        self.metadata: dict[str, Any] = {}
        allowed = torch.tensor([token for token in range(vocabulary) if token not in avoid] or [0])
        ids = allowed[torch.randint(0, len(allowed), (self.size, len(columns)), generator=random)]
        if end is not None:
            ids[1, lengths[1] - 1] = end
        self._tensors = {
            "input_ids": ids,
            "attention_mask": (columns < torch.tensor(list(lengths))[:, None]).long(),
        }

    def has(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def tensor(self, name: str, rows: Any) -> Tensor:
        return self._tensors[name][rows]

    def micro_batch(self, device: torch.device, packed: bool = False, dtype: torch.dtype = torch.float32) -> MicroBatch:
        """All rows, side by side or packed into one stream."""
        return BatchReader(self, Layout.of(self), (), device, dtype, packed).read(range(self.size))
