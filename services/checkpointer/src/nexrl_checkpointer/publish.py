"""Staging folder to published checkpoint. May be killed anywhere and run again by anyone: it looks
at what is there.

The manifest in the destination names the job, so "is it published already" is one file read. The
folder travels staging -> hidden sibling of the destination (a copy where that is another file
system) -> destination (swapped in one step).
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Literal, Self

from nexrl_contract.errors import ServiceError
from nexrl_contract.records import JobRecord
from nexrl_storage import at
from nexrl_storage.manifest import (
    Manifest,
    staged_files,
    staging_folder,
    verify_files,
    write_manifest,
)
from nexrl_storage.protocol import invalid, join, place_of_the_caller, sibling
from nexrl_storage.publish import Replacement
from pydantic import BaseModel, ConfigDict, Field, ValidationError

_COPIED_BYTES = 8 << 20


class PublishRequest(BaseModel):
    """The second half of a save, as rank 0 hands it over in the job's params.

    ``staging`` is absolute, and so is ``path``, which may be of any storage; ``result`` is merged
    into what the caller of the save gets.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    job_id: str
    attempt: int
    order: int = 0
    identifier: str
    staging: Path
    path: str
    step: int
    seq: int
    kind: Literal["sharded"]
    weight_only: bool
    remove_previous: bool
    world_size: int = Field(ge=1)
    config_hash: str = ""
    fingerprint: str | None = None
    result: dict[str, Any] = {}

    @classmethod
    def of(cls, job: JobRecord, data: Path) -> Self:
        """Raises ``INTERNAL`` for params that no rank of ours wrote: the staging folder is deleted
        in the end."""
        of_the_job = job.model_dump(include={"attempt", "order", "identifier"})
        try:
            request = cls.model_validate({**job.params, **of_the_job, "job_id": job.id})
        except ValidationError as error:
            message = f"the publish request is malformed: {error.errors()[0]['msg']}"
            raise ServiceError("INTERNAL", message) from None
        expected = staging_folder(data, job.id)
        absolute = request.path.startswith("/") or "://" in request.path
        if request.staging.resolve() != expected.resolve() or not absolute:
            message = f"{request.staging} is not the staging folder of job {job.id}"
            raise ServiceError("INTERNAL", message)
        return request

    def place(self) -> Replacement[Manifest]:
        """Where it is published; each attempt has a hidden folder of its own there: one that was
        paused and replaced finds nothing to publish when it wakes."""
        return Replacement(self.path, self.job_id, Manifest, self.identifier, self.attempt)


def publish(request: PublishRequest, check_claim: Callable[[], None]) -> Manifest:
    """Verify, write the manifest, publish; ``check_claim`` raises when another process took the job
    over.

    Raises ``CHECKPOINT_INVALID``, ``PATH_REFUSED``, ``NO_SPACE`` or OSError; the destination is
    then what it was.
    """
    place = request.place()
    with place_of_the_caller(place.path):
        manifest = _of_this_job(request, place.path)
    if manifest is None:
        place.check()
        manifest = _prepare(request, place)
        check_claim()
        place.commit()
    discard(request)
    return manifest


def discard(request: PublishRequest) -> None:
    """Remove what this and earlier attempts left outside the destination, as far as that goes."""
    request.place().discard(request.staging)


def _of_this_job(request: PublishRequest, folder: Path | str) -> Manifest | None:
    manifest = request.place().record(folder)
    return manifest if manifest is not None and manifest.job_id == request.job_id else None


def _prepare(request: PublishRequest, place: Replacement[Manifest]) -> Manifest:
    """Fill the hidden folder: the complete checkpoint, manifest and all, beside its destination."""
    storage = at(place.path)
    for earlier in place.leftovers():
        manifest = _of_this_job(request, earlier)
        if manifest is not None:
            storage.move(earlier, place.new)
            return manifest
    manifest = _of_this_job(request, request.staging) or _verified(request)
    with place_of_the_caller(sibling(place.path, "")):
        storage.make(sibling(place.path, ""))
    try:
        with place_of_the_caller(place.path):
            storage.move(request.staging, place.new)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy(request.staging, place.new, manifest)
    return manifest


def _verified(request: PublishRequest) -> Manifest:
    """Compare staging with what the ranks say that they wrote; its manifest, written last."""
    if not request.staging.is_dir():
        raise invalid(f"the staging folder {request.staging} is gone; save again")
    files = tuple(staged_files(request.staging, request.world_size))
    verify_files(request.staging, files)
    taken = request.model_dump(include=set(Manifest.model_fields) - {"kind"})
    manifest = Manifest(**taken, created=time.time(), files=files)
    write_manifest(request.staging, manifest)
    return manifest


def _copy(source: Path, target: str, manifest: Manifest) -> None:
    """To another file system: each file read back and hashed again, the manifest last."""
    for entry in manifest.files:
        with at(source).open(join(source, entry.name)) as file:
            at(target).write(join(target, entry.name), _pieces(file))
    verify_files(target, manifest.files)
    write_manifest(target, manifest)


def _pieces(file: BufferedIOBase) -> Iterator[bytes]:
    while piece := file.read(_COPIED_BYTES):
        yield piece
