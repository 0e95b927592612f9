"""Readers of a checkpoint's tensors: any rows of any global tensor, whoever wrote them.

Files are mapped, not read whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from nexrl_contract.errors import ServiceError
from nexrl_storage.manifest import Manifest
from safetensors import SafetensorError
from torch import Tensor

from nexrl_worker.checkpoint.shards import OPTIMIZER_PREFIX, read_index
from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.model import weights
from nexrl_worker.training.model.quantised import Dequantised, quantisation
from nexrl_worker.training.model.weights import FolderReader, dtype_name


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
                self._open[name] = self._stack.enter_context(
                    weights.open_weights(self._folder / name)
                )
            except InvalidValue as error:
                raise ServiceError("CHECKPOINT_INVALID", error.message) from None
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
            raise ServiceError(
                "CHECKPOINT_INVALID", f"{self._folder / file} has no tensor {name}"
            ) from None
        if actual != shape:
            raise ServiceError(
                "CHECKPOINT_INVALID",
                f"{self._folder / file}: {name} has shape {list(actual)}, not {list(shape)}",
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
                    raise ServiceError(
                        "CHECKPOINT_INVALID", f"{folder}: {row['file']} is not in the manifest"
                    )
                self.shapes.setdefault(name, tuple(row["global_shape"]))
                self._pieces.setdefault(name, []).append(
                    _Piece(row["file"], row["offset"], row["rows"])
                )
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
                "CHECKPOINT_INVALID",
                f"{folder}: {name} has rows up to {reached} of {needed} in one run",
            )

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds the tensor."""
        return name in self._pieces

    def check(self, name: str) -> None:
        """Open the tensor's files and compare them with the index, so that reading cannot fail
        half-way."""
        shape = self.shapes[name]
        for piece in self._pieces[name]:
            self._files.check(piece.file, name, (piece.rows, *shape[1:]) if shape else ())

    def read(self, name: str, offset: int, length: int) -> Tensor:
        """Rows ``offset:offset + length`` of the global tensor along dim 0 (all of a 0-dim one), as
        it was saved."""
        found, position, stop = [], offset, offset + length
        for piece in self._pieces[name]:
            if piece.offset <= position < piece.offset + piece.rows and position < stop:
                end = min(stop, piece.offset + piece.rows)
                found.append(
                    self._files.rows(piece.file, name, position - piece.offset, end - piece.offset)
                )
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


class HuggingFaceReader(Dequantised):
    """The weights of any Hugging Face folder with safetensors files.

    Raises ``CHECKPOINT_INVALID`` saying what is wrong.
    """

    def __init__(self, folder: Path) -> None:
        try:
            super().__init__(FolderReader(folder), quantisation(folder))
        except InvalidValue as error:
            raise ServiceError(
                "CHECKPOINT_INVALID", _placed(folder, error.message), **error.details()
            ) from None

    @property
    def weight_dtypes(self) -> set[str]:
        """torch's names of the dtypes in the files."""
        return {dtype_name(code) for code in self.stored.values()}


def weight_files(folder: Path) -> list[str]:
    """Names of a Hugging Face folder's safetensors files.

    Raises ``CHECKPOINT_INVALID`` when there are none or one is missing.
    """
    try:
        return weights.weight_files(folder)
    except InvalidValue as error:
        raise ServiceError("CHECKPOINT_INVALID", error.message, **error.details()) from None


def _placed(folder: Path, message: str) -> str:
    return message if str(folder) in message else f"{folder}: {message}"
