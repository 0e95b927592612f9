"""Staging folder to published checkpoint. May be killed anywhere and run again by anyone: it looks
at what is there.

The manifest in the destination names the job, so "is it published already" is one file read. The
folder travels staging -> hidden sibling of the destination (a copy where that is another file
system) -> destination (swapped in one step).
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from nexrl_contract.errors import ServiceError
from nexrl_storage.files import (
    first_few,
    remove_folder,
    remove_listed,
    replace_folder,
    sync_folder,
    unlisted,
)
from nexrl_storage.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    describe,
    index_name,
    read_manifest,
    verify_files,
    write_manifest,
)
from pydantic import BaseModel, ValidationError

from nexrl_checkpointer.request import PublishRequest

_log = logging.getLogger(__name__)


class _RankIndex(BaseModel):
    """The part of a rank's index that concerns files."""

    rank: int
    world_size: int
    files: tuple[FileEntry, ...]


def publish(request: PublishRequest, check_claim: Callable[[], None]) -> Manifest:
    """Verify, write the manifest, publish; ``check_claim`` raises when another process took the job
    over.

    Raises ``CHECKPOINT_INVALID``, ``PATH_REFUSED``, ``NO_SPACE`` or OSError; the destination is
    then what it was.
    """
    manifest = _of_this_job(request, request.path)
    if manifest is None:
        check_destination(request)
        manifest = _prepare(request)
        check_claim()
        check_destination(request)  # long ago since the first time: others may have come meanwhile
        replace_folder(
            _sibling(request), request.path, lambda old: _remove_replaced(old, request.path)
        )
    discard(request)
    return manifest


def discard(request: PublishRequest) -> None:
    """Remove what this and earlier attempts left outside the destination, as far as that goes."""
    for folder in (*_siblings(request), request.staging):
        try:
            record = _manifest(folder)
            if record is not None and record.job_id != request.job_id:
                _remove_replaced(folder, request.path)
            else:
                remove_folder(folder)
        except OSError as error:
            _log.warning("leftover.kept path=%s reason=%s", folder, error.strerror)


def _remove_replaced(old: Path, path: Path) -> None:
    """``old`` was at ``path`` until now. What others put into it in the very last moment goes back
    to its place."""
    record = _manifest(old)
    if record is None:
        old.rmdir()
        return
    for name in foreign_entries(old, record):
        if os.path.lexists(path / name):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path / name))
        os.rename(old / name, path / name)
    remove_listed(old, file_names(record), MANIFEST)


def check_destination(request: PublishRequest) -> None:
    """Only an empty folder, or a sharded checkpoint of the same group and nothing else, is
    replaced.

    Raises ``PATH_REFUSED``.
    """
    path = request.path
    if not os.path.lexists(path):
        return
    record = None if path.is_symlink() else _manifest(path)
    if record is None:
        if path.is_symlink() or not path.is_dir() or any(path.iterdir()):
            raise _refused(
                path, "holds something that is no sharded checkpoint of this service", "remove it"
            )
        return
    if record.identifier != request.identifier:
        raise _refused(
            path,
            f"holds a checkpoint of group {record.identifier!r}",
            "remove it if nobody needs it",
        )
    if others := foreign_entries(path, record):
        raise _refused(
            path,
            f"holds more than the checkpoint to be replaced ({first_few(others)})",
            "move that elsewhere",
        )


def file_names(manifest: Manifest) -> list[str]:
    """The files of a checkpoint besides its manifest."""
    return [entry.name for entry in manifest.files]


def foreign_entries(folder: Path, manifest: Manifest) -> list[str]:
    """What others put into the folder of a checkpoint."""
    return unlisted(folder, [*file_names(manifest), MANIFEST])


def _refused(path: Path, why: str, way_out: str) -> ServiceError:
    return ServiceError(
        "PATH_REFUSED", f"{path} {why}; choose another path, or {way_out}", key="local_path"
    )


def _sibling(request: PublishRequest) -> Path:
    """Each attempt has its own: one that was paused and replaced finds nothing to publish when it
    wakes."""
    return request.path.with_name(f".{request.path.name}.new-{request.job_id}-{request.attempt}")


def _siblings(request: PublishRequest) -> list[Path]:
    """Of all attempts, and what :func:`replace_folder` puts aside."""
    prefix = f".{request.path.name}.new-{request.job_id}-"
    try:
        return [path for path in request.path.parent.iterdir() if path.name.startswith(prefix)]
    except OSError:
        return []


def _manifest(folder: Path) -> Manifest | None:
    """None where there is none that can be read."""
    try:
        return read_manifest(folder)
    except ServiceError:
        return None


def _of_this_job(request: PublishRequest, folder: Path) -> Manifest | None:
    manifest = _manifest(folder)
    return manifest if manifest is not None and manifest.job_id == request.job_id else None


def _prepare(request: PublishRequest) -> Manifest:
    """Make the sibling: the complete checkpoint, manifest and all, beside its destination."""
    sibling = _sibling(request)
    for earlier in _siblings(request):
        manifest = _of_this_job(request, earlier)
        if manifest is not None:
            os.rename(earlier, sibling)
            return manifest
    manifest = _of_this_job(request, request.staging) or _verified(request)
    _make_parents(request.path)
    try:
        os.rename(request.staging, sibling)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy(request.staging, sibling, manifest)
    sync_folder(sibling.parent)
    return manifest


def _make_parents(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise ServiceError(
            "PATH_REFUSED", f"{path.parent} cannot be made: {error.strerror}", key="local_path"
        ) from None


def _verified(request: PublishRequest) -> Manifest:
    if not request.staging.is_dir():
        raise ServiceError(
            "CHECKPOINT_INVALID", f"the staging folder {request.staging} is gone; save again"
        )
    files: list[FileEntry] = []
    for rank in range(request.world_size):
        index = _rank_index(request, rank)
        verify_files(request.staging, index.files)
        files += [*index.files, describe(request.staging, index_name(rank, request.world_size))]
    manifest = Manifest(
        identifier=request.identifier,
        job_id=request.job_id,
        step=request.step,
        seq=request.seq,
        world_size=request.world_size,
        config_hash=request.config_hash,
        weight_only=request.weight_only,
        fingerprint=request.fingerprint,
        created=time.time(),
        files=tuple(files),
    )
    write_manifest(request.staging, manifest)
    return manifest


def _rank_index(request: PublishRequest, rank: int) -> _RankIndex:
    path = request.staging / index_name(rank, request.world_size)
    try:
        index = _RankIndex.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ServiceError(
            "CHECKPOINT_INVALID",
            f"rank {rank} of {request.world_size} saved nothing: {path} is missing",
        ) from None
    except ValidationError as error:
        raise ServiceError(
            "CHECKPOINT_INVALID", f"{path} is not the index of a rank: {error.errors()[0]['msg']}"
        ) from None
    if (index.rank, index.world_size) != (rank, request.world_size):
        raise ServiceError(
            "CHECKPOINT_INVALID", f"{path} is the index of rank {index.rank} of {index.world_size}"
        )
    return index


def _copy(source: Path, target: Path, manifest: Manifest) -> None:
    """To another file system: each file synced and hashed again, the manifest last."""
    for entry in manifest.files:
        destination = target / entry.name
        destination.parent.mkdir(parents=True, exist_ok=True)
        with open(source / entry.name, "rb") as reader, open(destination, "wb") as writer:
            shutil.copyfileobj(reader, writer, 8 << 20)
            writer.flush()
            os.fsync(writer.fileno())
        sync_folder(destination.parent)
    verify_files(target, manifest.files)
    write_manifest(target, manifest)
