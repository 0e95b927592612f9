"""A whole payload on its way into the folder: a temporary file, renamed when it is complete."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from nexrl_contract.errors import ServiceError

from .common import Tally, byte_views, sums_checksum
from .files import create_file, disk_errors, replace_file, reserve, sync_folder, unique, write_at
from .protocol import Chunk, StoredPayload

TEMPORARY = ".tmp-"
SUMS = ".sums-"


def sums_path(folder: Path, payload_id: str) -> Path:
    """Where the checksums of a payload's blocks are."""
    return folder / f"{SUMS}{payload_id}"


class FileUpload:
    """See :class:`nexrl_payloads.Upload`."""

    def __init__(self, folder: Path, payload_id: str, nbytes: int | None, *, fsync: bool) -> None:
        self._target = folder / payload_id
        self._temporary = folder / unique(f"{TEMPORARY}{payload_id}-")
        self._fsync = fsync
        self._tally = Tally(f"payload {payload_id}", nbytes)
        with disk_errors():
            self._fd = create_file(self._temporary)
        try:
            with disk_errors():
                reserve(self._fd, 0, nbytes or 0)
        except ServiceError:
            self.abort()
            raise

    def write(self, *chunks: Chunk) -> None:
        views = byte_views(chunks)
        offset = self._tally.nbytes
        self._tally.add(views)
        with disk_errors():
            write_at(self._fd, views, offset)

    def commit(self) -> StoredPayload:
        self._tally.finish()
        sums = self._tally.sums()
        with disk_errors():
            if self._fsync:
                os.fsync(self._fd)
            replace_file(sums_path(self._target.parent, self._target.name), sums, fsync=self._fsync)
            os.replace(self._temporary, self._target)
            self._close()
            if self._fsync:
                sync_folder(self._target.parent)
        return StoredPayload(self._target.name, self._tally.nbytes, sums_checksum(sums))

    def abort(self) -> None:
        if self._fd >= 0:
            self._close()
            self._temporary.unlink(missing_ok=True)

    def _close(self) -> None:
        os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.abort()
