"""Sharded checkpoints: each rank writes its own rows and an index of them, and reads any rows
back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from nexrl_contract.errors import ServiceError
from nexrl_storage import at
from nexrl_storage.manifest import (
    Manifest,
    RankIndex,
    Rows,
    index_name,
    read_index,
    write_file,
)
from nexrl_storage.protocol import full_disk, invalid
from safetensors import SafetensorError
from torch import Tensor

from nexrl_worker.checkpoint.model_files import copy_model_files
from nexrl_worker.checkpoint.tensor_file import write_tensors
from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.model.weights import Shard, open_weights

STATE = "state.json"
MODEL_FILES = "huggingface"
OPTIMIZER_PREFIX = "optim."


@dataclass(frozen=True, slots=True)
class GroupState:
    """What rank 0 writes once: ``state`` (architecture, scalars, seq, step, seed, threads: JSON),
    and the small files of the model's ``source`` folder with ``changes`` to its configuration.
    """

    state: Mapping[str, Any]
    source: Path
    changes: Mapping[str, Any] = field(default_factory=dict)


def write_shards(
    folder: Path,
    rank: int,
    world_size: int,
    shards: Iterable[Shard],
    rng: Mapping[str, Any],
    group: GroupState | None = None,
    *,
    weight_only: bool = False,
) -> None:
    """Write this rank's files, the index last; rank 0 gives ``group``. Local.

    Raises ``NO_SPACE`` on a full disk, after removing what this rank wrote.
    """
    try:
        with full_disk(folder):
            _write(folder, rank, world_size, list(shards), rng, group, weight_only)
    except (OSError, ServiceError):
        for path in folder.glob(f"*rank{rank}-of-{world_size}.*"):
            at(folder).remove(path)
        raise


def _write(
    folder: Path,
    rank: int,
    world_size: int,
    shards: list[Shard],
    rng: Mapping[str, Any],
    group: GroupState | None,
    weight_only: bool,
) -> None:
    parts = {"model": [part for part in shards if not part.name.startswith(OPTIMIZER_PREFIX)]}
    if not weight_only:
        parts["optim"] = [part for part in shards if part.name.startswith(OPTIMIZER_PREFIX)]
    files, table = [], {}
    for kind, some in parts.items():
        path = folder / f"{kind}.rank{rank}-of-{world_size}.safetensors"
        tensors = {part.name: part.local_tensor for part in some}
        files.append(write_tensors(path, tensors, {"format": "pt"}))
        table.update({part.name: _rows(path.name, part) for part in some})
    if group is not None:
        files.append(write_file(folder, STATE, json.dumps(dict(group.state)).encode(), more=True))
        files += [
            entry.model_copy(update={"name": f"{MODEL_FILES}/{entry.name}"})
            for entry in copy_model_files(group.source, folder / MODEL_FILES, group.changes)
        ]
    index = RankIndex(
        rank=rank, world_size=world_size, files=tuple(files), tensors=table, rng=dict(rng)
    )
    write_file(folder, index_name(rank, world_size), index.model_dump_json().encode())


def _rows(file: str, part: Shard) -> Rows:
    tensor = part.local_tensor
    return Rows(
        file=file,
        dtype=str(tensor.dtype).removeprefix("torch."),
        global_shape=part.global_shape,
        offset=part.offset_dim0,
        rows=tensor.shape[0] if part.global_shape else 1,
    )


class ShardReader:
    """A sharded checkpoint, whatever the world size that wrote it; its files are mapped.

    Raises ``CHECKPOINT_INVALID`` where rows are missing.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._folder = folder
        self._pieces: dict[str, list[Rows]] = {}
        self._open: dict[str, Any] = {}
        known = {entry.name for entry in manifest.files}
        for rank in range(manifest.world_size):
            for name, rows in read_index(folder, rank, manifest.world_size).tensors.items():
                if rows.file not in known:
                    raise invalid(f"{folder}: {rows.file} is not in the manifest")
                self.shapes.setdefault(name, rows.global_shape)
                self._pieces.setdefault(name, []).append(rows)
        for name, pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece.offset)
            self._check_whole(name)

    def _check_whole(self, name: str) -> None:
        shape, reached = self.shapes[name], 0
        for piece in self._pieces[name]:
            if piece.offset > reached:
                break
            reached = max(reached, piece.offset + piece.rows)
        needed = shape[0] if shape else 1
        if reached != needed:
            reason = f"{name} has rows up to {reached} of {needed} in one run"
            raise invalid(f"{self._folder}: {reason}")

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds the tensor."""
        return name in self._pieces

    def check(self, name: str) -> None:
        """Open the tensor's files and compare them with the index, so that reading cannot fail
        half-way."""
        shape = self.shapes[name]
        for piece in self._pieces[name]:
            path, expected = self._folder / piece.file, (piece.rows, *shape[1:]) if shape else ()
            try:
                actual = tuple(self._file(piece.file).get_slice(name).get_shape())
            except SafetensorError:
                raise invalid(f"{path} has no tensor {name}") from None
            if actual != expected:
                reason = f"{name} has shape {list(actual)}, not {list(expected)}"
                raise invalid(f"{path}: {reason}")

    def read(self, name: str, offset: int, length: int) -> Tensor:
        """Rows ``offset:offset + length`` of the global tensor along dim 0 (all of a 0-dim one), as
        it was saved.

        Shapes: ``[length, *shape[1:]]``, ``[]`` of a 0-dim tensor.
        """
        if not self.shapes[name]:
            whole: Tensor = self._file(self._pieces[name][0].file).get_tensor(name)
            return whole
        found, position, stop = [], offset, offset + length
        for piece in self._pieces[name]:
            start, end = position - piece.offset, min(stop - piece.offset, piece.rows)
            if 0 <= start < end:
                found.append(self._file(piece.file).get_slice(name)[start:end])
                position = piece.offset + end
        if not found:
            found = [self._file(self._pieces[name][0].file).get_slice(name)[0:0]]
        return found[0] if len(found) == 1 else torch.cat(found)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every model tensor, whole, one at a time: what a Hugging Face folder holds."""
        for name, shape in self.shapes.items():
            if not name.startswith(OPTIMIZER_PREFIX):
                yield name, self.read(name, 0, shape[0] if shape else 1)

    def _file(self, name: str) -> Any:
        """Mapped at first use; raises ``CHECKPOINT_INVALID`` for a truncated or foreign file."""
        if name not in self._open:
            try:
                self._open[name] = open_weights(self._folder / name)
            except InvalidValue as error:
                raise invalid(error.message) from None
        return self._open[name]

    def close(self) -> None:
        """Unmap the files."""
        self._open.clear()
