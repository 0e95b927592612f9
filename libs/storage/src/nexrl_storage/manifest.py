"""What a checkpoint says about itself: ``manifest.json`` in a sharded one, ``nexrl.json`` in a
Hugging Face folder.

A folder without its manifest is not a checkpoint: it is written last, before the folder gets its
name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from nexrl_contract.errors import ServiceError
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from nexrl_storage import at
from nexrl_storage.protocol import Uri, invalid, join

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


Checkpoint = Manifest | Export
AnyCheckpoint = TypeVar("AnyCheckpoint", Manifest, Export)
AnyRecord = TypeVar("AnyRecord", bound=BaseModel)


class Rows(Described):
    """Where rows ``offset`` to ``offset + rows`` of a tensor lie; a 0-dim tensor has one row."""

    file: str
    dtype: str
    global_shape: tuple[int, ...]
    offset: int
    rows: int


class RankIndex(Described):
    """What one rank wrote of a sharded checkpoint: its files, the rows in them by tensor, and the
    state of its random generators."""

    rank: int
    world_size: int
    files: tuple[FileEntry, ...]
    tensors: dict[str, Rows] = {}
    rng: dict[str, Any] = {}


class Published(Described):
    """A checkpoint found by :func:`published`."""

    path: str
    checkpoint: Manifest | Export


def staging_folder(data: Path, job_id: str) -> Path:
    """Where the ranks of a save write, outside every path that a request may name."""
    return data / ".nexrl" / "staging" / job_id


def index_name(rank: int, world_size: int) -> str:
    """The file of a :class:`RankIndex`."""
    return f"rank{rank}-of-{world_size}.json"


def fingerprint_text(fingerprint: int) -> str:
    """A 64-bit fingerprint as 16 hex digits: JSON readers do not keep such integers exact."""
    return f"{fingerprint % (1 << 64):016x}"


def describe(folder: Uri, name: str) -> FileEntry:
    """Size and sha256 of a file, read from the storage; raises OSError."""
    with at(folder).open(join(folder, name)) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(name=name, size=file.tell(), sha256=digest)


def write_file(folder: Uri, name: str, content: bytes, *, more: bool = False) -> FileEntry:
    """Write a whole small file; returns what a manifest says of it. ``more`` as in ``write``."""
    written = at(folder).write(join(folder, name), (content,), more=more)
    return FileEntry(name=name, **written._asdict())


def write_manifest(folder: Uri, manifest: Checkpoint) -> None:
    """Write the file that makes ``folder`` a checkpoint; the last thing to do before the rename."""
    write_file(folder, record_name(manifest), manifest.model_dump_json(indent=1).encode())


def record_name(checkpoint: Checkpoint) -> str:
    """The file that says what a checkpoint is."""
    return MANIFEST if isinstance(checkpoint, Manifest) else EXPORT


def file_names(checkpoint: Checkpoint) -> list[str]:
    """All of a checkpoint's files; the one that says so last."""
    return [*(entry.name for entry in checkpoint.files), record_name(checkpoint)]


def read_manifest(folder: Uri, name: str = MANIFEST) -> Manifest | None:
    """The manifest of a sharded checkpoint, None where there is none.

    Raises ``CHECKPOINT_INVALID`` for an unreadable one.
    """
    return _read(join(folder, name), Manifest)


def read_export(folder: Uri) -> Export | None:
    """The record of a Hugging Face folder of ours; None and raises as :func:`read_manifest`."""
    return _read(join(folder, EXPORT), Export)


def read_record(folder: Uri) -> Checkpoint | None:
    """What a folder says that it is, None where it is no checkpoint; raises
    ``CHECKPOINT_INVALID``."""
    return read_manifest(folder) or read_export(folder)


def read_index(folder: Uri, rank: int, world_size: int) -> RankIndex:
    """One rank's index; raises ``CHECKPOINT_INVALID`` when it is missing or no such thing."""
    name = join(folder, index_name(rank, world_size))
    index = _read(name, RankIndex)
    if index is None:
        raise invalid(f"rank {rank} of {world_size} saved nothing: {name} is missing")
    if (index.rank, index.world_size) != (rank, world_size):
        raise invalid(f"{name} is the index of rank {index.rank} of {index.world_size}")
    return index


def staged_files(folder: Uri, world_size: int) -> Iterator[FileEntry]:
    """What all ranks wrote, and their indexes; raises as :func:`read_index` does."""
    for rank in range(world_size):
        yield from read_index(folder, rank, world_size).files
        yield describe(folder, index_name(rank, world_size))


def _read(uri: str, model: type[AnyRecord]) -> AnyRecord | None:
    try:
        with at(uri).open(uri) as file:
            return model.model_validate_json(file.read())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise invalid(f"{uri}: {where + ': ' if where else ''}{first['msg']}") from None


def verify_files(folder: Uri, files: Iterable[FileEntry], *, hashes: bool = True) -> None:
    """Compare files with what was written about them; without ``hashes`` their sizes alone.

    Raises ``CHECKPOINT_INVALID`` naming the first that differs.
    """
    for entry in files:
        name = join(folder, entry.name)
        try:
            with at(folder).open(name) as file:
                size = file.seek(0, 2)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise invalid(f"{name} is missing") from None
        if size != entry.size:
            raise invalid(f"{name} has {size} bytes; {entry.size} were written")
        if hashes and describe(folder, entry.name).sha256 != entry.sha256:
            raise invalid(f"{name} is corrupt: its sha256 is not the recorded one")


def published(roots: Iterable[Uri]) -> list[Published]:
    """Every published checkpoint under ``roots`` (hidden folders and what lies deeper than four
    levels left out), oldest first.
    """
    found = {item.path: item for root in roots for item in _scan(join(root), _SCAN_DEPTH)}
    return sorted(found.values(), key=lambda item: (item.checkpoint.created, item.path))


def _scan(folder: str, depth: int) -> Iterator[Published]:
    try:
        checkpoint = read_record(folder)
        there = at(folder).look(folder) if checkpoint is None and depth else None
    except (OSError, ServiceError):
        return
    if checkpoint is not None:
        yield Published(path=folder, checkpoint=checkpoint)
    for name, kind in sorted(there.inside.items()) if there else ():
        if not name.startswith(".") and kind != "file":
            yield from _scan(join(folder, name), depth - 1)
