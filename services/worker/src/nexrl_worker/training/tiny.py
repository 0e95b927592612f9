"""A batch of random tokens, for what a model shows on little work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class TinyRows:
    """Right-padded rows of these lengths, all tokens attended; the same ones at every call."""

    def __init__(self, vocabulary: int, lengths: Sequence[int]) -> None:
        columns = torch.arange(max(lengths))
        random = torch.Generator().manual_seed(0)
        self.size = len(lengths)
        self.metadata: dict[str, Any] = {}
        self._tensors = {
            "input_ids": torch.randint(0, vocabulary, (self.size, len(columns)), generator=random),
            "attention_mask": (columns < torch.tensor(list(lengths))[:, None]).long(),
        }

    def has(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def tensor(self, name: str, rows: Any) -> Tensor:
        return self._tensors[name][rows]
