"""Which checkpoint a new one replaces, and its removal once the new one is durable."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from nexrl_contract.errors import ServiceError
from nexrl_contract.records import LatestCheckpoint
from nexrl_ledger import Ledger
from nexrl_storage.files import remove_listed, sync_folder
from nexrl_storage.manifest import MANIFEST, Manifest, read_manifest
from pydantic import ValidationError

from nexrl_checkpointer.publish import file_names, foreign_entries
from nexrl_checkpointer.request import PublishRequest

_log = logging.getLogger(__name__)


def _kind(request: PublishRequest) -> str:
    """Full and weight-only checkpoints do not replace one another."""
    return request.kind + (":weight_only" if request.weight_only else "")


def replace_previous(ledger: Ledger, request: PublishRequest, submitted: float) -> None:
    """Remove the previous checkpoint if that was asked for, then record the new one. Repeatable.

    The new one must be durable. ``submitted``: when the save was asked for; where the group of that
    time is gone, nothing is known about its checkpoints, and nothing is removed or recorded. Nor is
    it where a later save has been recorded: this one's lease had lapsed, and to whoever comes late
    with it the newest one looks like the previous one.
    """
    group = ledger.groups.get(request.identifier)
    if group is None or group.state == "destroyed" or submitted < group.created_at:
        return
    previous = ledger.checkpoints.latest(request.identifier, _kind(request))
    if (
        previous is not None
        and previous.group_created_at == group.created_at
        and previous.order > request.order
    ):
        return
    if (
        request.remove_previous
        and previous is not None
        and previous.group_created_at == group.created_at
    ):
        _remove(previous, request)
    new = LatestCheckpoint(
        path=request.path,
        step=request.step,
        job_id=request.job_id,
        group_created_at=group.created_at,
        order=request.order,
    )
    ledger.checkpoints.record(request.identifier, _kind(request), new)


def _remove(previous: LatestCheckpoint, request: PublishRequest) -> None:
    """A rename hides it first, so that no half of it is ever seen.

    That of its folder; of its manifest alone where others put something into the folder, which
    stays. So does what cannot be removed: the new one is safe.
    """
    path = previous.path
    aside = path.with_name(f".{path.name}.old-{request.job_id}")
    hidden = path / f".{MANIFEST}.old-{request.job_id}"
    try:
        manifest = _removable(previous, request)
        if manifest is not None:
            os.rename(
                *((path / MANIFEST, hidden) if foreign_entries(path, manifest) else (path, aside))
            )
            sync_folder(path.parent)
            _log.info("previous.removed path=%s step=%d", path, previous.step)
        _remove_files(path, hidden)
        _remove_files(aside, aside / MANIFEST)
        with contextlib.suppress(OSError):
            aside.rmdir()
        if aside.is_dir() and not os.path.lexists(
            path
        ):  # others put something into it at the very last moment
            os.rename(aside, path)
    except OSError as error:
        _log.warning("previous.kept path=%s reason=%s", path, error.strerror)


def _remove_files(folder: Path, record: Path) -> None:
    """Delete what ``record``, the manifest under its present name, lists; a killed removal left it
    to be found."""
    try:
        manifest = Manifest.model_validate_json(record.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return
    remove_listed(folder, file_names(manifest), record.name)


def _removable(previous: LatestCheckpoint, request: PublishRequest) -> Manifest | None:
    """Only what this service published there for this group, and nothing that holds the new one."""
    if previous.path.is_symlink() or request.path.is_relative_to(previous.path):
        return None
    try:
        manifest = read_manifest(previous.path)
    except (OSError, ServiceError):
        return None
    ours = manifest is not None and (manifest.identifier, manifest.job_id) == (
        request.identifier,
        previous.job_id,
    )
    return manifest if ours else None
