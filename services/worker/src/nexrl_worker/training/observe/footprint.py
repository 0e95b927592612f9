"""How much memory an operation will take: known parts, and activations measured on few tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from nexrl_contract.sections import ActorConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nexrl_worker.training.batch.micro_batch import MicroBatch, TinyRows
from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.fsdp2 import release, sharded_modules
from nexrl_worker.training.model.build import Recipe, decoder_layers, sharded_layers
from nexrl_worker.training.model.lm_head import head_bytes
from nexrl_worker.training.model.policy import PolicyModel
from nexrl_worker.training.model.wrapper import ModelWrapper
from nexrl_worker.training.observe.costs import free_mib, held_mib

_MIB = 1024.0 * 1024.0
_LENGTHS = (16, 32, 64)
# Of what is free at the start. Other groups and programs take from a host's memory, too; a device
# is the rank's own.
_SHARE = {"cpu": 0.4, "cuda": 0.8}
_CLEARLY = 1.3  # the estimate is within a quarter


@dataclass(frozen=True)
class Activations:
    """Bytes by computed token: `linear` x C + `square` x C^2 of a row of C are kept, `passing` x C
    live in one layer.

    Of the `layers`, whose squares (of attention) pass one at a time where nothing is kept.
    """

    linear: float
    square: float
    passing: float
    layers: int = 1

    def of(self, rows: Sequence[int], trains: bool) -> float:
        """The most bytes at once for rows of these computed lengths."""
        squares = self.square * sum(length * length for length in rows)
        kept = self.linear * sum(rows) + squares if trains else squares / self.layers
        return kept + self.passing * sum(rows)


@dataclass(frozen=True)
class Room:
    """What the activations of one micro-batch may take on every rank, and what rows take of it.

    Fixed when the ranks start, so that a batch is cut the same way as long as they live.
    """

    mib: float
    model: ModelWrapper
    activations: Activations
    device: torch.device
    packed: bool

    def need_mib(self, lengths: Sequence[int], trains: bool) -> float:
        """What rows of these attended lengths take in one micro-batch."""
        longest = max(lengths)
        computed = [max(length if self.packed else longest, 1) for length in lengths]
        nbytes = self.activations.of(computed, trains) + _head(
            self.model, sum(computed), self.device, trains
        )
        return nbytes / _MIB

    def check_row(self, row: int, length: int, trains: bool) -> None:
        """Raise InvalidValue for a row that alone takes clearly more than is free. Local."""
        need, free = self.need_mib([length], trains), free_mib(self.device, dist.get_world_size())
        if need > _CLEARLY * free:
            expected = f"at most about {free:.0f} MiB, what is free for each rank"
            message = (
                f"row {row} has {length} attended tokens, which take about {need:.0f} MiB, "
                f"expected {expected}"
            )
            raise InvalidValue(
                message, tensor="input_ids", row=row, expected=expected, actual=f"{need:.0f} MiB"
            )


def make_room(model: ModelWrapper, actor: ActorConfig, packed: bool, recipe: Recipe) -> Room:
    """The room of the rank that has least, and the largest estimate of any, on every rank.
    Collective.

    What the gradients, the optimizer, gathered weights and a frozen reference will take is left out
    of what is free.
    """
    device, precision = recipe.device, recipe.precision
    activations = measure_activations(model, device, precision.batch, packed, recipe.recompute)
    sizes = Sizes.of(model)
    later = sizes.own + 3 * sizes.gathered * precision.param.itemsize
    later += 4 * sizes.own_trained + 4 * sizes.trained
    share = _SHARE.get(device.type, _SHARE["cpu"]) * free_mib(device, dist.get_world_size())
    mib = max(share - later / _MIB, share / 8)
    if device.type == "cuda" and mib > 1024.0:
        step = 1024.0
    else:
        step = 2.0 ** math.floor(math.log2(max(mib, 1.0)))
    least = max(mib // step * step, 1.0)
    numbers = [-least, activations.linear, activations.square, activations.passing]
    most = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    least, linear, square, passing = most.tolist()
    largest = Activations(linear, square, passing, activations.layers)
    return Room(-least, model, largest, device, packed)


@dataclass(frozen=True)
class Sizes:
    """Of the weights, in bytes as they are held: `own` of this rank and `own_trained` of it,
    `trained` of all ranks; `gathered` elements at once."""

    own: int
    own_trained: int
    trained: int
    gathered: int

    @classmethod
    def of(cls, model: ModelWrapper) -> Sizes:
        """What a forward gathers are two layers and the rest."""
        size = next(model.hf.parameters()).element_size()
        layers = [
            sum(param.numel() for param in layer.parameters()) for layer in sharded_layers(model.hf)
        ]
        held = [part for part in model.weights() if not part.replicated]
        whole = sum(math.prod(part.global_shape) for part in held)
        trained = sum(math.prod(part.global_shape) for part in model.trainable_shards())
        own_trained = sum(part.local_tensor.numel() for part in model.trainable_shards())
        own = sum(part.local_tensor.numel() for part in held)
        gathered = whole - sum(layers) + 2 * max(layers, default=0)
        return cls(own * size, own_trained * size, trained * size, gathered)


def measure_activations(
    model: ModelWrapper, device: torch.device, dtype: torch.dtype, packed: bool, recomputes: bool
) -> Activations:
    """Run three tiny rows forward and fit what autograd saves; nothing of it stays. Collective."""
    layers = decoder_layers(model.hf) or [model.hf]
    saved: list[float] = []
    passing = 0.0
    most = model.positions or max(_LENGTHS)
    lengths = _LENGTHS if most >= max(_LENGTHS) else (most // 4, most // 2, most)
    for length in lengths:
        micro = TinyRows(model.vocabulary, (length,)).micro_batch(device, packed, dtype)
        with _outputs(layers[-1]) as outputs, _saved(model) as kept, torch.enable_grad():
            model(partial(_body, model, micro))
        release(model)
        saved.append(float(sum(kept.values())))
        passing = sum(outputs) / length
    powers = torch.tensor([[1.0, length, length**2] for length in lengths], dtype=torch.float64)
    wanted = torch.tensor(saved, dtype=torch.float64)
    _, linear, square = torch.linalg.solve(powers, wanted).tolist()
    if recomputes:  # every layer's input is kept, and one layer at a time is computed again
        size = next(model.hf.parameters()).element_size()
        linear += len(layers) * model.text_config.hidden_size * size
        passing *= 2
    return Activations(max(linear, 0.0), max(square, 0.0), passing, len(layers))


def _body(model: ModelWrapper, micro: MicroBatch) -> Tensor:
    return model.hidden(micro) if model.has_body else model.own_logits(micro)


@dataclass(frozen=True)
class Load:
    """One rank's share of an operation: computed lengths of the rows of every micro-batch, and what
    they are for.

    `first_step` touches AdamW's moments for the first time; `keeps_gradients`: whole ones, until
    the last micro-batch; `compute_bytes` of a gathered weight.
    """

    micros: Sequence[Sequence[int]]
    trains: bool
    first_step: bool
    keeps_gradients: bool
    reference: bool
    compute_bytes: int


def peak_mib(
    model: ModelWrapper, activations: Activations, load: Load, device: torch.device
) -> float:
    """The most MiB that this rank will hold (CUDA: allocated).

    What it holds now, the gathered weights, and the larger of two moments: when activations are
    whole (beside the gradients of earlier micro-batches), or when the optimizer steps.
    """
    sizes = Sizes.of(model)
    gathered = sizes.gathered * load.compute_bytes
    tokens = max((sum(micro) for micro in load.micros), default=0)
    passing = max((activations.of(micro, load.trains) for micro in load.micros), default=0.0)
    passing += _head(model, tokens, device, load.trains)
    stepping = 0
    if load.trains:
        # Whole gradients, and their copy for the reduce-scatter.
        reduced = 2 if dist.get_world_size() > 1 else 1
        passing += reduced * gathered + (sizes.own_trained if len(load.micros) > 1 else 0)
        passing += sizes.trained if load.keeps_gradients else 0
        # On CUDA the moments are counted from the start, on the CPU from when they are first
        # touched.
        stepping = sizes.own_trained * (3 if load.first_step and device.type == "cpu" else 1)
    gathered *= 2 if load.reference else 1
    return held_mib(device) + (gathered + max(passing, stepping)) / _MIB


def _head(model: ModelWrapper, tokens: int, device: torch.device, trains: bool) -> float:
    """Bytes of logits: chunks, several times all where the family computes its own, or none."""
    if not isinstance(model, PolicyModel):
        return 0.0
    if model.fallback is not None:
        size = max(next(model.hf.parameters()).element_size(), 4)
        return 3.0 * size * tokens * model.vocabulary
    return float(head_bytes(tokens, model.vocabulary, device, trains))


@contextmanager
def _saved(model: ModelWrapper) -> Iterator[dict[int, int]]:
    """Bytes that autograd saves inside the block, by address, without gathered weights."""
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # an address must not be given to another tensor meanwhile
    # Of the modules that are gathered now: the addresses of their weights.
    gathered: dict[nn.Module, set[int]] = {}

    def note(module: nn.Module, args: object) -> None:
        whole = (param for param in module.parameters() if not isinstance(param, DTensor))
        gathered[module] = {param.untyped_storage().data_ptr() for param in whole}

    def forget(module: nn.Module, args: object, output: object) -> None:
        del gathered[module]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if not any(address in weights for weights in gathered.values()):
            found[address] = storage.nbytes()
            alive.append(tensor.detach())
        # A node that kept its own output, graph and all, would never be freed.
        return tensor.detach()

    modules: list[nn.Module] = [*sharded_modules(model)]
    hooks = [module.register_forward_pre_hook(note) for module in modules]
    hooks += [module.register_forward_hook(forget) for module in modules]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _outputs(layer: nn.Module) -> Iterator[list[int]]:
    """Bytes of what every innermost module of `layer` gives inside the block."""
    found: list[int] = []

    def note(module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor):
            found.append(output.numel() * output.element_size())

    hooks = [
        part.register_forward_hook(note) for part in layer.modules() if not list(part.children())
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
