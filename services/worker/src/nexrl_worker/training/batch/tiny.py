"""A batch of random tokens, for what a model shows on little work."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from nexrl_worker.training.batch.micro_batch import BatchReader, Layout, MicroBatch, RowsInMemory


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
        ids = allowed[
            torch.randint(0, len(allowed), (len(lengths), len(columns)), generator=random)
        ]
        if end is not None:
            ids[1, lengths[1] - 1] = end
        attended = (columns < torch.tensor(list(lengths))[:, None]).long()
        super().__init__({"input_ids": ids, "attention_mask": attended})

    def micro_batch(
        self, device: torch.device, packed: bool = False, dtype: torch.dtype = torch.float32
    ) -> MicroBatch:
        """All rows, side by side or packed into one stream."""
        return BatchReader(self, Layout.of(self), (), device, dtype, packed).read(range(self.size))
