"""One 64-bit number for a set of weights, the same however they are sharded.

fingerprint = sum over elements of bits(x) * w(name, i) mod 2^64, where bits is the element's memory
read as a signed integer, i its index in the flattened global tensor, and w(name, i) = table[i mod
65536] * block(name, i div 65536), both factors odd. Table and block values come from SplitMix64; a
name's seed is its BLAKE2b-64.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

_BLOCK = 1 << 16
_GROUP = {
    "cpu": 4,
    "cuda": 256,
}  # blocks handled at once: what stays in a CPU's cache, or fills a GPU
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _split_mix(seed: int, start: int, count: int) -> Tensor:
    """`count` odd int64 numbers of the SplitMix64 stream of `seed`, from position `start`."""
    with np.errstate(over="ignore"):
        state = np.uint64(seed) + np.arange(
            start + 1, start + count + 1, dtype=np.uint64
        ) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = (state ^ (state >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(state.view(np.int64).copy())


def weight_table(device: torch.device) -> Tensor:
    """The factors that every block shares, [65536] int64, for `partial_fingerprint`."""
    return _split_mix(0, 0, _BLOCK).to(device)


def partial_fingerprint(name: str, tensor: Tensor, start: int, table: Tensor) -> Tensor:
    """The share of a piece whose first element has global index `start`: 0-dim int64, wrapping."""
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    if tensor.numel() == 0:
        return total
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view(_BITS[flat.element_size()])
    seed = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")
    first = start // _BLOCK
    blocks = _split_mix(seed, first, (start + bits.numel() - 1) // _BLOCK - first + 1).to(
        tensor.device
    )
    group = _GROUP.get(tensor.device.type, 4)
    scratch = torch.empty((group, _BLOCK), dtype=torch.int64, device=tensor.device)
    at = 0
    while at < bits.numel():
        inside, number = (start + at) % _BLOCK, (start + at) // _BLOCK - first
        whole = min((bits.numel() - at) // _BLOCK, group) if inside == 0 else 0
        count = whole * _BLOCK if whole else min(_BLOCK - inside, bits.numel() - at)
        piece = bits[at : at + count].view(max(whole, 1), -1)
        products = scratch[: max(whole, 1), : piece.shape[1]]
        products.copy_(piece).mul_(table[inside : inside + piece.shape[1]])
        total += (products.sum(dim=1) * blocks[number : number + max(whole, 1)]).sum()
        at += count
    return total


def fingerprint_of(tensors: Iterable[tuple[str, Tensor]]) -> int:
    """The fingerprint of whole tensors, 0 to 2^64 - 1; that of an export equals the engine's."""
    total = 0
    table: Tensor | None = None
    for name, tensor in tensors:
        table = weight_table(tensor.device) if table is None else table
        total += int(partial_fingerprint(name, tensor, 0, table))
    return total % (1 << 64)
