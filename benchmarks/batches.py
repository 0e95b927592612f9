"""The batches that travel: six tensors, 40 bytes a token."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import xxhash
from nexrl_contract import envelope
from torch import Tensor

NAMES = ("input_ids", "attention_mask", "position_ids", "loss_mask", "advantages", "old_log_probs")
TOKEN_BYTES = 40
_BLOCK = bytes(1024 * 1024)


@dataclass(frozen=True, slots=True)
class Size:
    """``[rows, length]`` tokens."""

    rows: int
    length: int

    @property
    def nbytes(self) -> int:
        """Bytes of the six tensors."""
        return self.rows * self.length * TOKEN_BYTES

    @property
    def label(self) -> str:
        """As a table shows it."""
        return f"{self.rows} x {self.length} ({self.nbytes / 1e6:.0f} MB)"


def make_batch(size: Size) -> dict[str, Tensor]:
    """Random tokens, nothing padded; integers are int64, the rest float32."""
    generator = torch.Generator().manual_seed(0)
    shape = (size.rows, size.length)
    ones = torch.ones(shape, dtype=torch.int64)
    return {
        "input_ids": torch.randint(0, 1000, shape, generator=generator),
        "attention_mask": ones,
        "position_ids": torch.arange(size.length).repeat(size.rows, 1),
        "loss_mask": ones.clone(),
        "advantages": torch.randn(shape, generator=generator),
        "old_log_probs": -torch.rand(shape, generator=generator),
    }


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Reads every byte once, at about the speed of memory: proof that all of them arrived,
    whichever way they came."""
    total = xxhash.xxh3_64()
    for name in NAMES:
        total.update(tensors[name].numpy().data.cast("B"))
    return total.hexdigest()


def blank_frame(size: Size) -> tuple[int, Iterator[bytes]]:
    """Length and bytes of a frame of zeros, made while it is sent: a client of any batch needs no
    memory for it."""
    entries: dict[str, object] = {"__metadata__": envelope.written({})}
    start = 0
    for name in NAMES:
        wide = name not in ("advantages", "old_log_probs")
        end = start + size.rows * size.length * (8 if wide else 4)
        shape = [size.rows, size.length]
        entries[name] = {
            "dtype": "I64" if wide else "F32",
            "shape": shape,
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % 64)
    head = len(text).to_bytes(8, "little") + text

    def pieces() -> Iterator[bytes]:
        yield head
        for position in range(0, size.nbytes, len(_BLOCK)):
            yield _BLOCK[: size.nbytes - position]

    return len(head) + size.nbytes, pieces()
