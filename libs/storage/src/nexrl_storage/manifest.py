"""What a checkpoint says about itself: ``manifest.json`` in a sharded one, ``nexrl.json`` in a
Hugging Face folder.

A folder without its manifest is not a checkpoint: it is written last, before the folder gets its
name.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from nexrl_contract.errors import ServiceError
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from nexrl_storage.files import write_file

MANIFEST = "manifest.json"
EXPORT = "nexrl.json"
_SCAN_DEPTH = 4


def _inside(name: str) -> str:
    if not name or name.startswith("/") or ".." in Path(name).parts:
        raise ValueError(f"file name {name!r} leaves the checkpoint's folder")
    return name


class Described(BaseModel):
    """Frozen; unknown fields of a newer version are kept out."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class FileEntry(Described):
    """One file of a checkpoint, by its path relative to the folder; ``size`` in bytes, ``sha256``
    in hex."""

    name: Annotated[str, AfterValidator(_inside)]
    size: int
    sha256: str


class _Checkpoint(Described):
    schema_version: Literal[1] = 1
    identifier: str
    step: int
    fingerprint: str | None = None
    """16 hex digits (:func:`fingerprint_text`)."""
    created: float
    files: tuple[FileEntry, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files)


class Manifest(_Checkpoint):
    """A sharded checkpoint: ``seq`` operations are in its weights, ``world_size`` ranks wrote it
    for job ``job_id``."""

    kind: Literal["sharded"] = "sharded"
    job_id: str
    seq: int
    world_size: int
    config_hash: str
    weight_only: bool


class Export(_Checkpoint):
    """A Hugging Face folder that this service wrote; ``weight_version`` counts the operations in
    its weights.

    ``fingerprint`` is of the tensors in its files; ``master_fingerprint`` of the group's own, from
    which they were cast, renamed and cut.
    """

    kind: Literal["huggingface"] = "huggingface"
    ours: Literal[True] = True
    weight_version: int
    master_fingerprint: str | None = None


AnyCheckpoint = TypeVar("AnyCheckpoint", Manifest, Export)


class Published(Described):
    """A checkpoint found by :func:`published`."""

    path: str
    checkpoint: Manifest | Export


def index_name(rank: int, world_size: int) -> str:
    """The file in which a rank lists its tensors and (``files``) what it wrote."""
    return f"rank{rank}-of-{world_size}.json"


def fingerprint_text(fingerprint: int) -> str:
    """A 64-bit fingerprint as 16 hex digits: JSON readers do not keep such integers exact."""
    return f"{fingerprint % (1 << 64):016x}"


def describe(folder: Path, name: str) -> FileEntry:
    """Size and sha256 of a file, read from the disk; raises OSError."""
    with open(folder / name, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(name=name, size=os.fstat(file.fileno()).st_size, sha256=digest)


def write_manifest(folder: Path, manifest: Manifest | Export) -> None:
    """Write the file that makes ``folder`` a checkpoint, synced; the last thing to do before the
    rename."""
    name = MANIFEST if isinstance(manifest, Manifest) else EXPORT
    write_file(folder / name, manifest.model_dump_json(indent=1).encode())


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a sharded checkpoint, None where there is none.

    Raises ``CHECKPOINT_INVALID`` for an unreadable one.
    """
    return _read(folder / MANIFEST, Manifest)


def read_export(folder: Path) -> Export | None:
    """The record of a Hugging Face folder of ours, None where there is none; raises
    ``CHECKPOINT_INVALID``."""
    return _read(folder / EXPORT, Export)


def _read(path: Path, model: type[AnyCheckpoint]) -> AnyCheckpoint | None:
    try:
        return model.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ServiceError(
            "CHECKPOINT_INVALID", f"{path}: {where + ': ' if where else ''}{first['msg']}"
        ) from None


def verify_files(folder: Path, files: Iterable[FileEntry]) -> None:
    """Compare files with what was written about them; raises ``CHECKPOINT_INVALID`` naming the
    first that differs."""
    for entry in files:
        check_size(folder, entry)
        if describe(folder, entry.name).sha256 != entry.sha256:
            raise ServiceError(
                "CHECKPOINT_INVALID",
                f"{folder / entry.name} is corrupt: its sha256 is not the recorded one",
            )


def check_size(folder: Path, entry: FileEntry) -> None:
    """The cheap half of :func:`verify_files`: the file is there and has its size."""
    path = folder / entry.name
    try:
        size = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        raise ServiceError("CHECKPOINT_INVALID", f"{path} is missing") from None
    if size != entry.size:
        raise ServiceError(
            "CHECKPOINT_INVALID", f"{path} has {size} bytes; {entry.size} were written"
        )


def published(roots: Iterable[Path]) -> list[Published]:
    """Every published checkpoint under ``roots`` (hidden folders and what lies deeper than four
    levels left out), oldest first.
    """
    found = {item.path: item for root in roots for item in _scan(root, _SCAN_DEPTH)}
    return sorted(found.values(), key=lambda item: (item.checkpoint.created, item.path))


def _scan(folder: Path, depth: int) -> Iterator[Published]:
    try:
        checkpoint = read_manifest(folder) or read_export(folder)
        children = (
            sorted(folder.iterdir())
            if checkpoint is None and depth and not folder.is_symlink()
            else []
        )
    except (OSError, ServiceError):
        return
    if checkpoint is not None:
        yield Published(path=str(folder), checkpoint=checkpoint)
    for child in children:
        if not child.name.startswith(".") and child.is_dir():
            yield from _scan(child, depth - 1)
