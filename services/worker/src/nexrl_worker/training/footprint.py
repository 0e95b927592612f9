"""How much memory an operation will take: parts that are known, and activations measured on a few tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nexrl_worker.training.batch import BatchReader, Layout
from nexrl_worker.training.chunked import head_bytes
from nexrl_worker.training.memory import held_mib
from nexrl_worker.training.parallelize import decoder_layers, release
from nexrl_worker.training.roots import Root
from nexrl_worker.training.scorer import Scorer
from nexrl_worker.training.tiny import TinyRows
from nexrl_worker.training.weights import parameter_shards

_MIB = 1024.0 * 1024.0
_LENGTHS = (16, 32, 64)


@dataclass(frozen=True)
class Activations:
    """Bytes by computed token: `linear` x C + `square` x C^2 of a row of C are kept, `passing` x C live in one layer."""

    linear: float
    square: float
    passing: float

    def of(self, rows: Sequence[int], trains: bool) -> float:
        """The most bytes at once for rows of these computed lengths."""
        kept = sum(self.linear * length + self.square * length * length for length in rows) if trains else 0.0
        return kept + self.passing * sum(rows)


def measure_activations(
    root: Root, device: torch.device, dtype: torch.dtype, packed: bool, recomputes: bool
) -> Activations:
    """Run three tiny rows forward and fit what autograd saves; nothing of it stays. Collective."""
    layers = decoder_layers(root.hf)
    saved: list[float] = []
    passing = 0.0
    most = root.positions or max(_LENGTHS)
    lengths = [min(length, most) for length in _LENGTHS] if most >= max(_LENGTHS) else [most // 4, most // 2, most]
    for length in lengths:
        rows = TinyRows(root.vocabulary, (length,))
        micro = BatchReader(rows, Layout.of(rows), (), device, dtype, packed).read([0])
        with _outputs(layers[0]) as outputs, _saved(root) as kept, torch.enable_grad():
            root(lambda micro=micro: root.hidden(micro, micro.index))
        release(root)
        saved.append(float(sum(kept.values())))
        passing = sum(outputs) / length
    powers = torch.tensor([[1.0, length, length**2] for length in lengths], dtype=torch.float64)
    _, linear, square = torch.linalg.solve(powers, torch.tensor(saved, dtype=torch.float64)).tolist()
    if recomputes:  # every layer's input is kept, and one layer at a time is computed again
        hidden: Any = root.hf.config
        linear += len(layers) * hidden.hidden_size * next(root.hf.parameters()).element_size()
        passing *= 2
    return Activations(max(linear, 0.0), max(square, 0.0), passing)


@dataclass(frozen=True)
class Load:
    """One rank's share of an operation: computed lengths of the rows of every micro-batch, and what they are for.

    `first_step` touches AdamW's moments for the first time; `keeps_gradients`: whole ones, until the last micro-batch;
    `compute_bytes` of a gathered weight.
    """

    micros: Sequence[Sequence[int]]
    trains: bool
    first_step: bool
    keeps_gradients: bool
    reference: bool
    compute_bytes: int


def peak_mib(root: Root, activations: Activations, load: Load, device: torch.device) -> float:
    """The most MiB that this rank will hold (CUDA: allocated).

    What it holds now, the gathered weights, and the larger of two moments: when activations are whole (beside the
    gradients of earlier micro-batches), or when the optimizer steps.
    """
    size = next(root.hf.parameters()).element_size()
    layers = [sum(param.numel() for param in layer.parameters()) for layer in decoder_layers(root.hf)]
    whole = sum(param.numel() for param in root.hf.parameters())
    own = sum(part.local_tensor.numel() for part in parameter_shards(root.hf)) * size
    gathered = (whole - sum(layers) + 2 * max(layers)) * load.compute_bytes
    tokens = max((sum(micro) for micro in load.micros), default=0)
    passing = max((activations.of(micro, load.trains) for micro in load.micros), default=0.0)
    passing += _head(root, tokens, device, load.trains)
    stepping = 0
    if load.trains:
        reduced = 2 if dist.get_world_size() > 1 else 1  # whole gradients, and their copy for the reduce-scatter
        passing += reduced * gathered + (own if len(load.micros) > 1 else 0)
        passing += whole * size if load.keeps_gradients else 0
        # On CUDA the moments are counted from the start, on the CPU from when they are first touched.
        stepping = own * (3 if load.first_step and device.type == "cpu" else 1)
    gathered *= 2 if load.reference else 1
    return held_mib(device) + (gathered + max(passing, stepping)) / _MIB


def _head(root: Root, tokens: int, device: torch.device, trains: bool) -> float:
    """Bytes of logits: chunks of them, all of them several times over where the family computes its own, or none."""
    if not isinstance(root, Scorer):
        return 0.0
    if root.fallback is not None:
        size = max(next(root.hf.parameters()).element_size(), 4)
        return float(size * tokens * root.vocabulary * (5 if trains else 3))
    return float(head_bytes(tokens, root.vocabulary, device, trains))


@contextmanager
def _saved(root: Root) -> Iterator[dict[int, int]]:
    """Bytes of every storage that autograd saves inside the block, by address; gathered weights are not counted."""
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # an address must not be given to another tensor meanwhile

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        gathered = (param for param in root.parameters() if not isinstance(param, DTensor))
        if all(param.untyped_storage().data_ptr() != storage.data_ptr() for param in gathered):
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor.detach()  # a node that kept its own output, graph and all, would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


@contextmanager
def _outputs(layer: nn.Module) -> Iterator[list[int]]:
    """Bytes of what every innermost module of `layer` gives inside the block."""
    found: list[int] = []

    def note(module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor):
            found.append(output.numel() * output.element_size())

    hooks = [part.register_forward_hook(note) for part in layer.modules() if not list(part.children())]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
