"""What a checkpoint path holds and whether it can be loaded:

Everything that can go wrong, before any weight changes. All local.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nexrl_contract.errors import ServiceError
from nexrl_storage import local_folder
from nexrl_storage.manifest import Checkpoint, Manifest, read_index, read_record, verify_files
from nexrl_storage.protocol import Uri, invalid
from torch import Tensor

from nexrl_worker.checkpoint.model_files import CONFIG
from nexrl_worker.checkpoint.shards import OPTIMIZER_PREFIX, STATE, ShardReader
from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.model.quantised import Dequantised
from nexrl_worker.training.model.weight_sources import folder_tensors
from nexrl_worker.training.model.weights import weight_files

# What transformers calls the heads of models that are no language models.
_HEADS = ("score", "classifier", "qa_outputs")


class TensorReader(Protocol):
    """What the engine loads from; ``shapes`` are the global ones, by name."""

    shapes: dict[str, tuple[int, ...]]

    def has(self, name: str) -> bool: ...
    def read(self, name: str, offset: int, length: int) -> Tensor: ...
    def close(self) -> None: ...


@contextlib.contextmanager
def invalid_folder(folder: Path) -> Iterator[None]:
    """What is wrong with a model's tensors is ``CHECKPOINT_INVALID`` and names their folder."""
    try:
        yield
    except InvalidValue as error:
        placed = error.message if str(folder) in error.message else f"{folder}: {error.message}"
        raise ServiceError("CHECKPOINT_INVALID", placed, **error.details()) from None


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """A checkpoint that is all there. ``record`` is None for a Hugging Face folder that others
    made."""

    folder: Path
    record: Checkpoint | None

    @property
    def kind(self) -> str:
        """``sharded`` or ``huggingface``."""
        return "sharded" if isinstance(self.record, Manifest) else "huggingface"

    @property
    def has_optimizer(self) -> bool:
        """Whether moments, schedule and random state can be restored, not only weights."""
        return isinstance(self.record, Manifest) and not self.record.weight_only

    @property
    def step(self) -> int | None:
        """The trainer's step it was saved at, where it is known."""
        return self.record.step if self.record is not None else None

    @property
    def mark(self) -> str:
        """Two folders with the same mark are the same checkpoint; empty for one that others
        made."""
        return (
            ""
            if self.record is None
            else hashlib.sha256(self.record.model_dump_json().encode()).hexdigest()
        )

    def check_unchanged(self, mark: str) -> None:
        """Raises ``CHECKPOINT_INVALID`` where the folder is not (any more) what the rank that gave
        ``mark`` saw."""
        if LoadPlan(self.folder, read_record(self.folder)).mark != mark:
            raise invalid(f"{self.folder} was replaced while it was read; load it again")

    def verify(self, rank: int, world_size: int) -> None:
        """Hash this rank's share of the files (``files[rank::world_size]``).

        Raises ``CHECKPOINT_INVALID`` naming one.
        """
        if self.record is not None:
            verify_files(self.folder, self.record.files[rank::world_size])

    def reader(self) -> ShardReader | Dequantised:
        """Opens the tensors; raises ``CHECKPOINT_INVALID``. Close it after loading."""
        if isinstance(self.record, Manifest):
            return ShardReader(self.folder, self.record)
        with invalid_folder(self.folder):
            return folder_tensors(self.folder)

    def check_fits(
        self,
        reader: TensorReader,
        needed: Mapping[str, tuple[int, ...]],
        architecture: str,
        whole: bool = True,
    ) -> None:
        """``needed``: the group's tensors and global shapes; ``architecture``: the class of its
        model.

        ``whole``: these are all of its tensors, so that the checkpoint may hold no others.

        Raises ``CHECKPOINT_INVALID`` where it is another model's checkpoint. Afterwards every file
        that will be read is open.
        """
        saved = self._architecture()
        if saved is not None and saved != architecture:
            raise invalid(f"{self.folder} holds a {saved}, the group's model is a {architecture}")
        others = sorted(reader.shapes.keys() - needed.keys())
        # A model with a tied head needs nothing that a critic's checkpoint lacks: what is too much
        # tells them apart.
        if head := next((name for name in others if name.split(".")[0] in _HEADS), None):
            reason = f"{head}, a head that the group's {architecture} does not have"
            raise invalid(f"{self.folder} holds {reason}", tensor=head)
        for name, shape in needed.items():
            if name.startswith(OPTIMIZER_PREFIX) and not self.has_optimizer:
                continue
            if not reader.has(name):
                reason = f"has no tensor {name}: it is of another model"
                raise invalid(f"{self.folder} {reason}", tensor=name)
            if (found := reader.shapes[name]) != tuple(shape):
                reason = f"{name} has shape {list(found)}, the model's has {list(shape)}"
                raise invalid(f"{self.folder}: {reason}", tensor=name)
            if isinstance(reader, ShardReader):
                reader.check(name)
        for name in others if whole else ():
            if not name.startswith(OPTIMIZER_PREFIX):
                reason = f"{name}, for which the group's {architecture} has no place"
                raise invalid(f"{self.folder} holds {reason}", tensor=name)

    def _architecture(self) -> str | None:
        """The class of the model that a group saved; None where it is not known."""
        if self.kind != "sharded" or not (self.folder / STATE).is_file():
            return None
        saved = self._state_file().get("architecture")
        return None if saved is None else str(saved)

    def _state_file(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.folder / STATE).read_bytes()))
        except (OSError, ValueError, TypeError):
            raise invalid(f"{self.folder / STATE} is not the state of a group") from None

    def state(self) -> dict[str, Any]:
        """What rank 0 wrote of the group (architecture, scalars, seq, step, seed, threads); raises
        ``CHECKPOINT_INVALID``.

        Sharded only.
        """
        state = self._state_file()
        try:
            scalars = {name: _count(value) for name, value in dict(state["scalars"]).items()}
            return {**state, "scalars": scalars, "seed": _count(state.get("seed", 0))}
        except (KeyError, ValueError, TypeError):
            raise invalid(f"{self.folder / STATE} is not the state of a group") from None

    def rng(self, rank: int, world_size: int) -> dict[str, Any] | None:
        """The rank's saved random state, None where another world size wrote it (reseed from the
        saved seed).

        Sharded only.
        """
        if not isinstance(self.record, Manifest) or self.record.world_size != world_size:
            return None
        return read_index(self.folder, rank, world_size).rng


def inspect(path: Uri) -> LoadPlan:
    """Find out what lies at ``path`` (a link is followed once); raises ``CHECKPOINT_INVALID`` with
    what is wrong.

    Looks at names, sizes and headers; :meth:`LoadPlan.verify` hashes.
    """
    folder = local_folder(path)
    reason = ""
    try:
        there = folder.is_dir()
    except OSError as error:  # a name too long, a folder that may not be entered
        there, reason = False, f": {error.strerror}"
    if not there:
        raise invalid(f"there is no checkpoint at {path}{reason}")
    record = read_record(folder)
    if record is not None:
        verify_files(folder, record.files, hashes=False)
    elif any(folder.glob("model.rank*-of-*.safetensors")):
        raise invalid(f"{folder} has shards but no manifest: its save was never finished")
    elif not (folder / CONFIG).is_file():
        raise invalid(f"{folder} has neither a manifest nor a Hugging Face config.json")
    else:
        with invalid_folder(folder):
            weight_files(folder)
    return LoadPlan(folder, record)


def _count(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ValueError(value)
    return value
