"""A rank's part of the weights: shards out and in, whole tensors gathered one by one. Shards are cut along dim 0."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nexrl_worker.training.errors import InvalidValue

FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""What weights are trained and exported in, by safetensors' names."""


def dtype_name(code: str) -> str:
    """torch's name for a dtype that safetensors calls `code`; of other ones safetensors' own."""
    return str(FLOAT_DTYPES.get(code, code)).removeprefix("torch.")


@dataclass(frozen=True)
class Shard:
    """This rank's rows of a global tensor: `local_tensor` (a view, maybe empty) from row `offset_dim0` on."""

    name: str
    local_tensor: Tensor
    global_shape: tuple[int, ...]
    offset_dim0: int


class Reader(Protocol):
    """Where weights come from: any rows of any global tensor."""

    def read(self, name: str, offset: int, length: int) -> Tensor:
        """Rows offset .. offset+length of the tensor along dim 0 (all of a 0-dim tensor)."""
        ...


class FolderReader:
    """Reads slices of a Hugging Face folder's safetensors files without touching the rest.

    `shapes` are those of the whole tensors, `dtypes` safetensors' names of theirs ("BF16"). Files stay mapped until `close`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, Any] = {}
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            self._files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        elif (folder / "model.safetensors").is_file():
            with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
                self._files = dict.fromkeys(file.keys(), "model.safetensors")
        else:
            raise InvalidValue(f"{folder} has no safetensors weights; other formats are not read")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for name in self._files:
            part = self._file(name).get_slice(name)
            self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), part.get_dtype()

    def has(self, name: str) -> bool:
        """Whether the folder holds the tensor."""
        return name in self.shapes

    def check(self, name: str) -> None:
        """Every file is open."""

    def read(self, name: str, offset: int, length: int) -> Tensor:
        file = self._file(name)
        part = file.get_slice(name)
        rows: Tensor = part[offset : offset + length] if part.get_shape() else file.get_tensor(name)
        return rows

    def close(self) -> None:
        """Unmap the files."""
        self._open.clear()

    def _file(self, name: str) -> Any:
        file = self._files[name]
        if file not in self._open:
            self._open[file] = safe_open(str(self._folder / file), framework="pt")
        return self._open[file]


class MemoryReader:
    """Reads slices of a state dict in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def read(self, name: str, offset: int, length: int) -> Tensor:
        tensor = self._tensors[name]
        return tensor[offset : offset + length] if tensor.ndim else tensor


def persistent_buffers(hf: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that belong to a saved model; every rank holds them whole."""
    saved = hf.state_dict(keep_vars=True).keys()
    return ((name, buffer) for name, buffer in hf.named_buffers() if name in saved)


def rows_per_rank(total: int, world_size: int) -> int:
    """Rows of every shard but the last ones, as FSDP cuts dim 0."""
    return -(-total // world_size)


def parameter_shards(hf: nn.Module) -> Iterator[Shard]:
    """This rank's part of every parameter, by its Hugging Face name; a tied head appears once."""
    for name, param in hf.named_parameters():
        if not isinstance(param, DTensor):
            raise TypeError(f"parameter {name} is not sharded")
        local = param.to_local().detach()
        step = rows_per_rank(param.shape[0], param.device_mesh.size())
        offset = min(step * param.device_mesh.get_local_rank(), param.shape[0])
        yield Shard(name, local, tuple(param.shape), offset)


@torch.no_grad()
def fill(shard: Shard, reader: Reader) -> None:
    """Overwrite the shard's memory with its rows from the reader; raises InvalidValue on another shape."""
    rows = reader.read(shard.name, shard.offset_dim0, shard.local_tensor.shape[0])
    if rows.shape != shard.local_tensor.shape:
        expected, actual = str(list(shard.local_tensor.shape)), str(list(rows.shape))
        raise InvalidValue(f"rows of {shard.name} have shape {actual}, the model needs {expected}", tensor=shard.name)
    shard.local_tensor.copy_(rows)


@torch.no_grad()
def load_parameters(hf: nn.Module, reader: Reader) -> None:
    """Fill parameters and saved buffers of the sharded model; reads only this rank's rows."""
    for part in parameter_shards(hf):
        fill(part, reader)
    for name, buffer in persistent_buffers(hf):
        buffer.copy_(reader.read(name, 0, buffer.shape[0] if buffer.ndim else 1))


@torch.no_grad()
def gather(part: Shard) -> Tensor | None:
    """The whole tensor on rank 0's device, None on the others. Collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    local = part.local_tensor
    if world == 1:
        return local
    step = rows_per_rank(part.global_shape[0], world)
    padded = local.new_zeros((step, *part.global_shape[1:]))
    padded[: local.shape[0]].copy_(local)
    pieces = [torch.empty_like(padded) for _ in range(world)] if rank == 0 else None
    dist.gather(padded, pieces, dst=0)
    return None if pieces is None else torch.cat(pieces)[: part.global_shape[0]]
