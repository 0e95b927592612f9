"""A sharded save: each rank writes its own rows and an index of them into the job's staging
folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nexrl_contract.errors import ServiceError
from nexrl_storage.files import remove_folder, write_file
from nexrl_storage.manifest import FileEntry, describe, index_name
from torch import Tensor

from nexrl_worker.checkpoint.model_files import copy_model_files
from nexrl_worker.checkpoint.tensor_file import no_space, write_tensors

STATE = "state.json"
MODEL_FILES = "huggingface"
OPTIMIZER_PREFIX = "optim."


class ShardLike(Protocol):
    """What :class:`nexrl_worker.training.model.weights.Shard` is: rows of a global tensor from row
    ``offset_dim0`` on."""

    @property
    def name(self) -> str: ...
    @property
    def local_tensor(self) -> Tensor: ...
    @property
    def global_shape(self) -> tuple[int, ...]: ...
    @property
    def offset_dim0(self) -> int: ...


@dataclass(frozen=True, slots=True)
class GroupState:
    """What rank 0 writes once: ``state`` (architecture, scalars, seq, step, seed, threads: JSON),
    and the small files of the model's ``source`` folder with ``changes`` to its configuration.
    """

    state: Mapping[str, Any]
    source: Path
    changes: Mapping[str, Any] = field(default_factory=dict)


def staging_folder(data: Path, job_id: str) -> Path:
    """Where the ranks of a save write, outside every path that a request may name."""
    return data / ".nexrl" / "staging" / job_id


def prepare_staging(folder: Path) -> None:
    """Make an empty staging folder. Rank 0 only, before the vote that lets the others write.
    Local."""
    remove_folder(folder)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise no_space(error, folder) from error


def discard_staging(folder: Path) -> None:
    """Remove a staging folder that will not be published. Rank 0 only, after the vote. Local."""
    shutil.rmtree(folder, ignore_errors=True)


def write_shards(
    folder: Path,
    rank: int,
    world_size: int,
    shards: Iterable[ShardLike],
    rng: Mapping[str, Any],
    group: GroupState | None = None,
    *,
    weight_only: bool = False,
) -> list[FileEntry]:
    """Write and sync this rank's files, the index last; rank 0 gives ``group``. Returns all of
    them. Local.

    Raises ``NO_SPACE`` on a full disk, after removing what this rank wrote.
    """
    try:
        return _write(folder, rank, world_size, list(shards), rng, group, weight_only)
    except (OSError, ServiceError) as error:
        for path in folder.glob(f"*rank{rank}-of-{world_size}.*"):
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise no_space(error, folder) from error
        raise


def _write(
    folder: Path,
    rank: int,
    world_size: int,
    shards: list[ShardLike],
    rng: Mapping[str, Any],
    group: GroupState | None,
    weight_only: bool,
) -> list[FileEntry]:
    parts = {"model": [part for part in shards if not part.name.startswith(OPTIMIZER_PREFIX)]}
    if not weight_only:
        parts["optim"] = [part for part in shards if part.name.startswith(OPTIMIZER_PREFIX)]
    files, table = [], {}
    for kind, some in parts.items():
        path = folder / f"{kind}.rank{rank}-of-{world_size}.safetensors"
        files.append(
            write_tensors(path, {part.name: part.local_tensor for part in some}, {"format": "pt"})
        )
        table.update({part.name: _row(path.name, part) for part in some})
    if group is not None:
        write_file(folder / STATE, json.dumps(dict(group.state)).encode())
        names = [STATE, *copy_model_files(group.source, folder / MODEL_FILES, group.changes)]
        files += [
            describe(folder, name if name == STATE else f"{MODEL_FILES}/{name}") for name in names
        ]
    index = {
        "rank": rank,
        "world_size": world_size,
        "files": [entry.model_dump() for entry in files],
        "tensors": table,
        "rng": rng,
    }
    name = index_name(rank, world_size)
    write_file(folder / name, json.dumps(index).encode())
    return [*files, describe(folder, name)]


def _row(file: str, part: ShardLike) -> dict[str, Any]:
    tensor = part.local_tensor
    return {
        "file": file,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "global_shape": list(part.global_shape),
        "offset": part.offset_dim0,
        "rows": tensor.shape[0] if part.global_shape else 1,
    }


def read_index(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """One rank's index; raises ``CHECKPOINT_INVALID`` when it is missing or no such thing.
    Local."""
    path = folder / index_name(rank, world_size)
    try:
        index = json.loads(path.read_bytes())
        if not isinstance(index["tensors"], dict):
            raise TypeError
    except FileNotFoundError:
        raise ServiceError(
            "CHECKPOINT_INVALID", f"{path} is missing: rank {rank} of {world_size} is not there"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ServiceError("CHECKPOINT_INVALID", f"{path} is not the index of a rank") from None
    return dict(index)
