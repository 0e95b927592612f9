"""Readers of a checkpoint's tensors: any rows of any global tensor, whoever wrote them.

Files are mapped, not read whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import torch
from nexrl_contract.errors import ServiceError
from nexrl_contract.manifest import Manifest
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nexrl_worker.checkpoint.shards import OPTIMIZER_PREFIX, read_index
from nexrl_worker.training.weights import dtype_name

Answer = TypeVar("Answer")
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"


class TensorReader(Protocol):
    """What the engine loads from; ``shapes`` are the global ones, by name."""

    shapes: dict[str, tuple[int, ...]]

    def has(self, name: str) -> bool: ...
    def check(self, name: str) -> None: ...
    def read(self, name: str, offset: int, length: int) -> Tensor: ...
    def close(self) -> None: ...


class _Files:
    """Mapped safetensors files of one folder, opened at first use."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()

    def file(self, name: str) -> Any:
        """Raises ``CHECKPOINT_INVALID`` for a missing, truncated or foreign file."""
        if name not in self._open:
            try:
                self._open[name] = self._stack.enter_context(safe_open(str(self._folder / name), framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ServiceError("CHECKPOINT_INVALID", f"{self._folder / name} cannot be read: {error}") from None
        return self._open[name]

    def rows(self, file: str, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` of a tensor; all of a 0-dim one."""
        part = self.file(file).get_slice(name)
        rows: Tensor = part[start:stop] if part.get_shape() else self.file(file).get_tensor(name)
        return rows

    def check(self, file: str, name: str, shape: tuple[int, ...]) -> None:
        """Open ``file``; raises ``CHECKPOINT_INVALID`` unless it holds the tensor in that shape."""
        try:
            actual = tuple(self.file(file).get_slice(name).get_shape())
        except SafetensorError:
            raise ServiceError("CHECKPOINT_INVALID", f"{self._folder / file} has no tensor {name}") from None
        if actual != shape:
            raise ServiceError(
                "CHECKPOINT_INVALID", f"{self._folder / file}: {name} has shape {list(actual)}, not {list(shape)}"
            )

    def close(self) -> None:
        self._open.clear()
        self._stack.close()


@dataclass(frozen=True, slots=True)
class _Piece:
    file: str
    offset: int
    rows: int


class ShardReader:
    """A sharded checkpoint, whatever the world size that wrote it.

    Raises ``CHECKPOINT_INVALID`` where rows are missing.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        self._files = _Files(folder)
        known = {entry.name for entry in manifest.files}
        for rank in range(manifest.world_size):
            for name, row in read_index(folder, rank, manifest.world_size)["tensors"].items():
                if row["file"] not in known:
                    raise ServiceError("CHECKPOINT_INVALID", f"{folder}: {row['file']} is not in the manifest")
                self.shapes.setdefault(name, tuple(row["global_shape"]))
                self._pieces.setdefault(name, []).append(_Piece(row["file"], row["offset"], row["rows"]))
        for name, pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece.offset)
            self._check_whole(folder, name)

    def _check_whole(self, folder: Path, name: str) -> None:
        shape, reached = self.shapes[name], 0
        for piece in self._pieces[name]:
            if piece.offset > reached:
                break
            reached = max(reached, piece.offset + piece.rows)
        needed = shape[0] if shape else 1
        if reached != needed:
            raise ServiceError(
                "CHECKPOINT_INVALID", f"{folder}: {name} has rows up to {reached} of {needed} in one run"
            )

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds the tensor."""
        return name in self._pieces

    def check(self, name: str) -> None:
        """Open the tensor's files and compare them with the index, so that reading cannot fail half-way."""
        shape = self.shapes[name]
        for piece in self._pieces[name]:
            self._files.check(piece.file, name, (piece.rows, *shape[1:]) if shape else ())

    def read(self, name: str, offset: int, length: int) -> Tensor:
        """Rows ``offset:offset + length`` of the global tensor along dim 0 (all of a 0-dim one), as it was saved."""
        found, position, stop = [], offset, offset + length
        for piece in self._pieces[name]:
            if piece.offset <= position < piece.offset + piece.rows and position < stop:
                end = min(stop, piece.offset + piece.rows)
                found.append(self._files.rows(piece.file, name, position - piece.offset, end - piece.offset))
                position = end
        if not found:
            return self._files.rows(self._pieces[name][0].file, name, 0, 0)
        return found[0] if len(found) == 1 else torch.cat(found)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every model tensor, whole, one at a time: what a Hugging Face folder holds."""
        for name, shape in self.shapes.items():
            if not name.startswith(OPTIMIZER_PREFIX):
                yield name, self.read(name, 0, shape[0] if shape else 1)

    def close(self) -> None:
        """Unmap the files."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class HuggingFaceReader:
    """The weights of any Hugging Face folder with safetensors files.

    Raises ``CHECKPOINT_INVALID`` saying what is wrong.
    """

    def __init__(self, folder: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: set[str] = set()
        self._file_of: dict[str, str] = {}
        self._files = _Files(folder)
        for file in sorted(weight_files(folder)):
            opened = self._files.file(file)
            for name in opened.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                self._file_of[name] = file
                part = opened.get_slice(name)
                self.shapes[name] = tuple(part.get_shape())
                self.dtypes.add(dtype_name(part.get_dtype()))
                if part.get_dtype().startswith(("F8", "F6", "F4")):
                    message = (
                        f"{folder / file}: {name} is {part.get_dtype()}, which is quantised and lacks its scale here"
                    )
                    raise ServiceError("CHECKPOINT_INVALID", message, tensor=name)

    def has(self, name: str) -> bool:
        """Whether the folder holds the tensor."""
        return name in self._file_of

    def check(self, name: str) -> None:
        """The files are open, and the shapes are the files' own."""
        self._files.check(self._file_of[name], name, self.shapes[name])

    def read(self, name: str, offset: int, length: int) -> Tensor:
        """Rows ``offset:offset + length`` along dim 0 (all of a 0-dim tensor), in the file's dtype."""
        return self._files.rows(self._file_of[name], name, offset, offset + length)

    def close(self) -> None:
        """Unmap the files."""
        self._files.close()


def weight_files(folder: Path) -> set[str]:
    """Names of a Hugging Face folder's safetensors files.

    Raises ``CHECKPOINT_INVALID`` when there are none or one is missing.
    """
    if (folder / WEIGHTS_INDEX).is_file():
        names = _parsed(folder / WEIGHTS_INDEX, lambda index: {str(name) for name in index["weight_map"].values()})
        for name in sorted(names):
            if "/" in name or not (folder / name).is_file():
                raise ServiceError("CHECKPOINT_INVALID", f"{folder / name} is missing, but the index names it")
        return names
    if (folder / WEIGHTS).is_file():
        return {WEIGHTS}
    raise ServiceError("CHECKPOINT_INVALID", f"{folder} has no safetensors weights; other formats are not read")


def _parsed(path: Path, pick: Callable[[Any], Answer]) -> Answer:
    try:
        return pick(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ServiceError("CHECKPOINT_INVALID", f"{path} is not what it should be") from None
