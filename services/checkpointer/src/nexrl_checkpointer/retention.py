"""Which checkpoint a new one replaces, and its removal once the new one is durable."""

from __future__ import annotations

import contextlib
import logging
import posixpath

from nexrl_contract.errors import ServiceError
from nexrl_contract.records import LatestCheckpoint
from nexrl_ledger import Ledger
from nexrl_storage import at
from nexrl_storage.manifest import MANIFEST, Manifest, file_names, read_manifest
from nexrl_storage.protocol import join, sibling
from nexrl_storage.publish import others_in, remove_listed

from nexrl_checkpointer.publish import PublishRequest

_log = logging.getLogger(__name__)


def _key(request: PublishRequest) -> str:
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
    previous = ledger.checkpoints.latest(request.identifier, _key(request))
    if previous is not None and previous.group_created_at == group.created_at:
        if previous.order > request.order:
            return
        if request.remove_previous:
            _remove(previous, request)
    new = LatestCheckpoint(
        path=request.path,
        step=request.step,
        job_id=request.job_id,
        group_created_at=group.created_at,
        order=request.order,
    )
    ledger.checkpoints.record(request.identifier, _key(request), new)


def _remove(previous: LatestCheckpoint, request: PublishRequest) -> None:
    """A rename hides it first, so that no half of it is ever seen.

    That of its folder; of its manifest alone where others put something into the folder, which
    stays. So does what cannot be removed: the new one is safe.
    """
    path = previous.path
    aside = sibling(path, f".{posixpath.basename(path)}.old-{request.job_id}")
    hidden = f".{MANIFEST}.old-{request.job_id}"
    storage = at(path)
    try:
        manifest = _removable(previous, request)
        if manifest is not None:
            if others_in(path, file_names(manifest)):
                storage.move(join(path, MANIFEST), join(path, hidden))
            else:
                storage.move(path, aside)
            _log.info("previous.removed path=%s step=%d", path, previous.step)
        _remove_files(path, hidden)
        _remove_files(aside, MANIFEST)
        with contextlib.suppress(OSError):
            storage.remove(aside)
        if storage.look(aside) is not None and storage.look(path) is None:
            # Others put something into it between the look inside and the rename: back with it.
            storage.move(aside, path)
    except OSError as error:
        _log.warning("previous.kept path=%s reason=%s", path, error.strerror)


def _remove_files(folder: str, record: str) -> None:
    """Delete what ``record``, the manifest under its present name, lists; a killed removal left it
    to be found."""
    manifest = None
    with contextlib.suppress(ServiceError):
        manifest = read_manifest(folder, record)
    if manifest is not None:
        remove_listed(folder, [*file_names(manifest)[:-1], record])


def _removable(previous: LatestCheckpoint, request: PublishRequest) -> Manifest | None:
    """Only what this service published there for this group, and nothing that holds the new one."""
    there = at(previous.path).look(previous.path)
    inside = f"{request.path}/".startswith(f"{previous.path}/")
    if there is None or there.kind == "link" or inside:
        return None
    try:
        manifest = read_manifest(previous.path)
    except (OSError, ServiceError):
        return None
    if manifest is None or manifest.job_id != previous.job_id:
        return None
    return manifest if manifest.identifier == request.identifier else None
