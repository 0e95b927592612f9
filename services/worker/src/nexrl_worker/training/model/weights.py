"""A rank's part of the weights, cut along dim 0: shards out and in, whole tensors gathered."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nexrl_worker.training.errors import InvalidValue

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # safetensors' own limit
FLOAT_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""What weights are trained and exported in, by safetensors' names."""


def dtype_name(code: str) -> str:
    """torch's name for a dtype that safetensors calls `code`; of other ones safetensors' own."""
    return str(FLOAT_DTYPES.get(code, code)).removeprefix("torch.")


@dataclass(frozen=True)
class Shard:
    """This rank's rows of a global tensor: `local_tensor` (a view, maybe empty) from row
    `offset_dim0` on. `replicated`: every rank holds all of it, as it does of saved buffers."""

    name: str
    local_tensor: Tensor
    global_shape: tuple[int, ...]
    offset_dim0: int
    replicated: bool = False


class Reader(Protocol):
    """Where weights come from: any rows of any global tensor."""

    def read(self, name: str, offset: int, length: int) -> Tensor:
        """Rows offset .. offset+length of the tensor along dim 0 (all of a 0-dim tensor)."""
        ...


class FolderReader:
    """Reads slices of a Hugging Face folder's safetensors files without touching the rest.

    `shapes` are those of the whole tensors, `dtypes` safetensors' names of theirs ("BF16"). Files
    stay mapped until `close`. Raises InvalidValue where files are missing or are no whole
    safetensors files.
    """

    def __init__(self, folder: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._file_of: dict[str, Any] = {}
        for name in weight_files(folder):
            file = open_weights(folder / name)
            for tensor in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                part = file.get_slice(tensor)
                self.shapes[tensor], self.dtypes[tensor] = tuple(part.get_shape()), part.get_dtype()
                self._file_of[tensor] = file

    def has(self, name: str) -> bool:
        """Whether the folder holds the tensor."""
        return name in self.shapes

    def read(self, name: str, offset: int, length: int) -> Tensor:
        """Rows `offset:offset + length` along dim 0 (all of a 0-dim tensor), in the file's
        dtype."""
        file = self._file_of[name]
        part = file.get_slice(name)
        rows: Tensor = part[offset : offset + length] if part.get_shape() else file.get_tensor(name)
        return rows

    def close(self) -> None:
        """Unmap the files."""
        self._file_of.clear()


def weight_files(folder: Path) -> list[str]:
    """Names of the weight files that transformers would read; raises InvalidValue."""
    index = folder / WEIGHTS_INDEX
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if index.is_file():
        try:
            placed = json.loads(index.read_bytes())["weight_map"].values()
            names = sorted({str(name) for name in placed})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            why = what_is_wrong(index) or "it has no weight_map"
            raise InvalidValue(f"{index} is not what it should be: {why}") from None
        for name in names:
            if "/" in name or not (folder / name).is_file():
                raise InvalidValue(f"{folder / name} is missing, but the index names it")
        return names
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(others) > 1:
        message = (
            f"{folder} has {len(others)} safetensors files ({others[0]} ...) but no "
            f"{WEIGHTS_INDEX}: fetch that too"
        )
        raise InvalidValue(message, expected=WEIGHTS_INDEX)
    if others:
        message = f"{folder} has {others[0]}, but neither {WEIGHTS} nor {WEIGHTS_INDEX}"
        raise InvalidValue(message, expected=WEIGHTS)
    raise InvalidValue(f"{folder} has no safetensors weights; other formats are not read")


def open_weights(path: Path) -> Any:
    """A mapped safetensors file; raises InvalidValue saying what it is instead."""
    try:
        return safe_open(str(path), framework="pt")
    except (OSError, SafetensorError) as error:
        raise InvalidValue(f"{path} cannot be read: {what_is_wrong(path) or error}") from error


def what_is_wrong(path: Path) -> str | None:
    """What a model's file is instead of itself: a pointer, nothing, a page, a part."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
            size = path.stat().st_size
            if start.startswith(b"version https://git-lfs"):
                return (
                    "it is a Git LFS pointer, not the file itself; run git lfs pull in its folder"
                )
            if not start:
                return "it is empty"
            if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
                return "it is a web page, not the file itself"
            if path.suffix != ".safetensors":
                return None
            header = int.from_bytes(start[:8], "little")
            if size < 8 or (header < _LONGEST_HEADER and size < 8 + header):
                return f"it is cut short: its header alone needs more than its {size} bytes"
            if header >= _LONGEST_HEADER:
                return "it is no safetensors file"
            file.seek(8)
            entries = json.loads(file.read(header))
            entries.pop("__metadata__", None)
            needed = 8 + header + max(entry["data_offsets"][1] for entry in entries.values())
            return f"it is cut short: {size} of {needed} bytes are there" if size < needed else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


class MemoryReader:
    """Reads slices of a state dict in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def read(self, name: str, offset: int, length: int) -> Tensor:
        tensor = self._tensors[name]
        return tensor[offset : offset + length] if tensor.ndim else tensor


def rows_per_rank(total: int, world_size: int) -> int:
    """Rows of every shard but the last ones, as FSDP cuts dim 0."""
    return -(-total // world_size)


def shard_of(name: str, param: nn.Parameter) -> Shard:
    """This rank's part of a parameter that FSDP has sharded; raises TypeError of another one."""
    if not isinstance(param, DTensor):
        raise TypeError(f"parameter {name} is not sharded")
    step = rows_per_rank(param.shape[0], param.device_mesh.size())
    offset = min(step * param.device_mesh.get_local_rank(), param.shape[0])
    return Shard(name, param.to_local().detach(), tuple(param.shape), offset)


@torch.no_grad()
def fill(parts: Iterable[Shard], reader: Reader) -> None:
    """Overwrite the shards' memory with their rows; raises InvalidValue on another shape."""
    for part in parts:
        part.local_tensor.copy_(_rows(part, reader))


def _rows(part: Shard, reader: Reader) -> Tensor:
    local = part.local_tensor
    rows = reader.read(part.name, part.offset_dim0, local.shape[0] if local.ndim else 1)
    if rows.shape != local.shape:
        expected, actual = str(list(local.shape)), str(list(rows.shape))
        message = f"rows of {part.name} have shape {actual}, the model needs {expected}"
        raise InvalidValue(message, tensor=part.name)
    return rows


@torch.no_grad()
def check_finite(parts: Iterable[Shard], reader: Reader | None = None) -> None:
    """Raise InvalidValue naming the first tensor in which this rank's rows hold NaN or infinity.
    Local.

    Of `reader`, before they are loaded; else of the model. Numbers are judged as the model holds
    them: float64 beyond float32 is infinity there. A saved buffer may hold infinity: some are
    masks.
    """
    for part in parts:
        rows = part.local_tensor if reader is None else _rows(part, reader)
        if part.replicated:
            if bool(rows.isnan().any()):
                raise InvalidValue(f"{part.name} holds NaN", tensor=part.name)
            continue
        rows = rows.to(part.local_tensor.dtype)
        if rows.numel() and not all(bool(end.isfinite()) for end in torch.aminmax(rows)):
            bad = int((~rows.isfinite()).reshape(len(rows), -1).any(dim=1).nonzero()[0])
            message = f"{part.name} holds NaN or infinity (row {part.offset_dim0 + bad})"
            raise InvalidValue(message, tensor=part.name)


@torch.no_grad()
def gather(part: Shard) -> Tensor | None:
    """The whole tensor on rank 0's device, None on the others. Collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    local = part.local_tensor
    if world == 1 or part.replicated:
        return local if rank == 0 else None
    step = rows_per_rank(part.global_shape[0], world)
    padded = local.new_zeros((step, *part.global_shape[1:]))
    padded[: local.shape[0]].copy_(local)
    pieces = [torch.empty_like(padded) for _ in range(world)] if rank == 0 else None
    dist.gather(padded, pieces, dst=0)
    return None if pieces is None else torch.cat(pieces)[: part.global_shape[0]]
