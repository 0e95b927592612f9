"""What a checkpoint path holds and whether it can be loaded:

Everything that can go wrong, before any weight changes. All local.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexrl_contract.errors import ServiceError
from nexrl_storage.manifest import (
    Export,
    Manifest,
    check_size,
    read_export,
    read_manifest,
    verify_files,
)

from nexrl_worker.checkpoint.model_files import CONFIG
from nexrl_worker.checkpoint.readers import (
    HuggingFaceReader,
    ShardReader,
    TensorReader,
    weight_files,
)
from nexrl_worker.checkpoint.shards import OPTIMIZER_PREFIX, STATE, read_index

# What transformers calls the heads of models that are no language models.
_HEADS = ("score", "classifier", "qa_outputs")


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """A checkpoint that is all there. ``record`` is None for a Hugging Face folder that others
    made."""

    folder: Path
    record: Manifest | Export | None

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
        if LoadPlan(self.folder, _record(self.folder)).mark != mark:
            raise ServiceError(
                "CHECKPOINT_INVALID", f"{self.folder} was replaced while it was read; load it again"
            )

    def verify(self, rank: int, world_size: int) -> None:
        """Hash this rank's share of the files (``files[rank::world_size]``).

        Raises ``CHECKPOINT_INVALID`` naming one.
        """
        if self.record is not None:
            verify_files(self.folder, self.record.files[rank::world_size])

    def reader(self) -> TensorReader:
        """Opens the tensors; raises ``CHECKPOINT_INVALID``. Close it after loading."""
        return (
            ShardReader(self.folder, self.record)
            if isinstance(self.record, Manifest)
            else HuggingFaceReader(self.folder)
        )

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
        self._check_head(reader, needed, architecture)
        for name, shape in needed.items():
            if name.startswith(OPTIMIZER_PREFIX) and not self.has_optimizer:
                continue
            if not reader.has(name):
                raise ServiceError(
                    "CHECKPOINT_INVALID",
                    f"{self.folder} has no tensor {name}: it is of another model",
                    tensor=name,
                )
            if reader.shapes[name] != tuple(shape):
                raise ServiceError(
                    "CHECKPOINT_INVALID",
                    (
                        f"{self.folder}: {name} has shape {list(reader.shapes[name])}, the model's "
                        f"has {list(shape)}"
                    ),
                    tensor=name,
                )
            reader.check(name)
        others = reader.shapes.keys() - needed.keys() if whole else ()
        for name in sorted(name for name in others if not name.startswith(OPTIMIZER_PREFIX)):
            message = (
                f"{self.folder} holds {name}, for which the group's {architecture} has no place"
            )
            raise ServiceError("CHECKPOINT_INVALID", message, tensor=name)

    def _check_head(
        self, reader: TensorReader, needed: Mapping[str, tuple[int, ...]], architecture: str
    ) -> None:
        """A model with a tied head needs nothing that a critic's checkpoint lacks: what is too much
        tells them apart."""
        saved = self._architecture()
        if saved is not None and saved != architecture:
            raise ServiceError(
                "CHECKPOINT_INVALID",
                f"{self.folder} holds a {saved}, the group's model is a {architecture}",
            )
        for name in sorted(reader.shapes.keys() - needed.keys()):
            if name.split(".")[0] in _HEADS:
                message = (
                    f"{self.folder} holds {name}, a head that the group's {architecture} does not "
                    "have"
                )
                raise ServiceError("CHECKPOINT_INVALID", message, tensor=name)

    def _architecture(self) -> str | None:
        """The class of the model that a group saved; None where it is not known."""
        path = self.folder / STATE
        if self.kind != "sharded" or not path.is_file():
            return None
        try:
            saved = json.loads(path.read_bytes()).get("architecture")
        except (OSError, ValueError, AttributeError):
            raise ServiceError(
                "CHECKPOINT_INVALID", f"{path} is not the state of a group"
            ) from None
        return None if saved is None else str(saved)

    def state(self) -> dict[str, Any]:
        """What rank 0 wrote of the group (architecture, scalars, seq, step, seed, threads); raises
        ``CHECKPOINT_INVALID``.

        Sharded only.
        """
        path = self.folder / STATE
        try:
            state = dict(json.loads(path.read_bytes()))
            scalars = {name: _count(value) for name, value in dict(state["scalars"]).items()}
            return {**state, "scalars": scalars, "seed": _count(state.get("seed", 0))}
        except (OSError, KeyError, ValueError, TypeError):
            raise ServiceError(
                "CHECKPOINT_INVALID", f"{path} is not the state of a group"
            ) from None

    def rng(self, rank: int, world_size: int) -> dict[str, Any] | None:
        """The rank's saved random state, None where another world size wrote it (reseed from the
        saved seed).

        Sharded only.
        """
        if not isinstance(self.record, Manifest) or self.record.world_size != world_size:
            return None
        return dict(read_index(self.folder, rank, world_size)["rng"])


def inspect(path: Path) -> LoadPlan:
    """Find out what lies at ``path`` (a link is followed once); raises ``CHECKPOINT_INVALID`` with
    what is wrong.

    Looks at names, sizes and headers; :meth:`LoadPlan.verify` hashes.
    """
    folder = path.resolve()
    try:
        there = folder.is_dir()
    except OSError as error:  # a name too long, a folder that may not be entered
        raise ServiceError(
            "CHECKPOINT_INVALID", f"there is no checkpoint at {path}: {error.strerror}"
        ) from None
    if not there:
        raise ServiceError("CHECKPOINT_INVALID", f"there is no checkpoint at {path}")
    record = _record(folder)
    for entry in record.files if record is not None else ():
        check_size(folder, entry)
    if record is None:
        _check_foreign(folder)
    return LoadPlan(folder, record)


def _record(folder: Path) -> Manifest | Export | None:
    return read_manifest(folder) or read_export(folder)


def _count(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ValueError(value)
    return value


def _check_foreign(folder: Path) -> None:
    if any(folder.glob("model.rank*-of-*.safetensors")):
        raise ServiceError(
            "CHECKPOINT_INVALID",
            f"{folder} has shards but no manifest: its save was never finished",
        )
    if not (folder / CONFIG).is_file():
        raise ServiceError(
            "CHECKPOINT_INVALID", f"{folder} has neither a manifest nor a Hugging Face config.json"
        )
    weight_files(folder)
