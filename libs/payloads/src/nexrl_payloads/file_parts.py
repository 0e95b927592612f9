"""Parts of one payload in a folder: those that come in order are written to where they stay, each
other one is a file of its own until all are put together.

``.parts-ID/`` holds

- ``part-N-CHECKSUM-NBYTES``  the record of part N: the table of its blocks' checksums. The part
  counts from the moment that this file is there, and is never replaced by another
- ``data-0``  the bytes of part 0, and at their place behind it those of every part that counts and
  has no ``data-N``. It becomes the payload. Who writes to it holds its lock
- ``data-N``  the bytes of part N, to be moved to their place
- ``tmp-*``   one being written; the sweep takes those of killed writers
- ``lock``    held for moments: while a part begins, while it begins to count, and while the payload
  is put together

So a payload is put together already where ``data-0`` has gone and the payload is there.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from nexrl_contract.errors import ServiceError
from nexrl_storage.local import sync_folder

from .checks import BlockHasher, tables_checksum
from .files import (
    NewFile,
    disk_errors,
    locked,
    replace_file,
    try_lock,
    unique,
    write_at,
)
from .protocol import Chunk, PartUpload, StoredPayload
from .rules import check_count, check_same, not_found

PARTS = ".parts-"
SUMS = ".sums-"
STEP = 256 * 1024
"""Bytes that move at once when parts are put together, and so all the room that it takes."""


class Part(NamedTuple):
    """A part that is there."""

    nbytes: int
    checksum: str


class FileParts:
    """The parts of one payload; every state is on disk, so any number of these may work on it at
    once."""

    def __init__(self, folder: Path, payload_id: str, *, fsync: bool) -> None:
        self.folder = folder / f"{PARTS}{payload_id}"
        self.payload_id = payload_id
        self.fsync = fsync
        self._target = folder / payload_id
        self._sums = folder / f"{SUMS}{payload_id}"

    def begin(self, n: int, hasher: BlockHasher, nbytes: int | None) -> NewFile:
        """Where part ``n`` is written to: its place, if all before it are there and nobody else
        writes; a file of its own; or, where it is there or comes too late, nowhere."""
        with disk_errors():
            with suppress(FileExistsError):
                self.folder.mkdir(mode=0o700)
                if self.fsync:
                    sync_folder(self.folder.parent)
            with locked(self.folder / "lock"):
                parts = self.present()
                if n in parts or self._assembled():
                    return NewFile(None, hasher, nbytes)
                before = [parts[each].nbytes for each in range(n) if each in parts]
                fd = self._open_free() if n and len(before) == n else None
            if fd is not None:
                return _InPlace(fd, sum(before), hasher, nbytes)
            return NewFile(self.folder / unique("tmp-"), hasher, nbytes)

    def present(self) -> dict[int, Part]:
        """All parts that are there, by number."""
        found = {}
        names: list[str] = []
        with disk_errors(), suppress(FileNotFoundError):
            names = os.listdir(self.folder)
        for name in names:
            if name.startswith("part-"):
                n, checksum, nbytes = name.removeprefix("part-").split("-")
                found[int(n)] = Part(int(nbytes), checksum)
        return dict(sorted(found.items()))

    def add(self, n: int, part: Part, file: NewFile, table: bytes) -> None:
        """Make a written file count as part ``n``; the same part again changes nothing."""
        with locked(self.folder / "lock"):
            # Another attempt at the part may have ended, and the payload may have been put
            # together, since this one began: so both are looked at again under the lock.
            known = self.present().get(n)
            if known is not None or file.fd < 0 or self._assembled():
                check_same(self.payload_id, n, known, part)
                return
            # A crash between these two leaves bytes that do not count and are written over.
            try:
                file.publish(self._data(n), fsync=self.fsync)
                replace_file(self._record(n, part), table, fsync=self.fsync)
            except BaseException:  # it may have its name already, and must not count
                self._record(n, part).unlink(missing_ok=True)
                if file.fd < 0:
                    self._data(n).unlink(missing_ok=True)
                raise
            file.close()

    def assemble(self, count: int) -> StoredPayload:
        """See :meth:`nexrl_payloads.PayloadStore.assemble`."""
        if not self.folder.exists():
            check_count(self.payload_id, [], count)
        with disk_errors(), locked(self.folder / "lock"):
            parts = self.present()
            check_count(self.payload_id, list(parts), count)
            tables = b"".join(self._record(n, part).read_bytes() for n, part in parts.items())
            if self._data(0).exists():
                self._join(parts)
                replace_file(self._sums, tables, fsync=self.fsync)
                os.replace(self._data(0), self._target)
            elif not self._target.exists():
                raise not_found(self.payload_id)
            for path in (self._target, self.folder):  # whoever asks again needs both
                os.utime(path)
            if self.fsync:
                sync_folder(self._target.parent)
        nbytes = sum(part.nbytes for part in parts.values())
        return StoredPayload(self.payload_id, nbytes, tables_checksum(tables))

    def _join(self, parts: dict[int, Part]) -> None:
        """Move the bytes of all parts to their place behind those of part 0.

        A part's file loses from its end what is in its place, so the payload is never there twice,
        and whoever goes on after a crash finds how far it came by the length of the file.
        """
        joined = self._open_free()
        if joined is None:
            # All parts are there, so whoever still writes repeats one of them, and may hang for as
            # long as its connection does. It goes on in a file that is no part of anything.
            joined = self._copied()
        try:
            offset = parts[0].nbytes
            for n in range(1, len(parts)):
                with suppress(FileNotFoundError):  # it is in its place
                    self._move(self._data(n), joined, offset, parts[n].nbytes)
                offset += parts[n].nbytes
            os.ftruncate(joined, offset)  # behind it may be what a killed writer left
            if self.fsync:
                os.fsync(joined)
        finally:
            os.close(joined)

    def _open_free(self) -> int | None:
        """``data-0`` and its lock, unless another writer has it."""
        fd = os.open(self._data(0), os.O_RDWR | os.O_CLOEXEC)
        if try_lock(fd):
            return fd
        os.close(fd)
        return None

    def _copied(self) -> int:
        temporary = self.folder / unique("tmp-")
        copy = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(self._data(0), "rb", buffering=0) as source:
                offset = 0
                while piece := source.read(STEP):
                    write_at(copy, [memoryview(piece)], offset)
                    offset += len(piece)
            if self.fsync:
                os.fsync(copy)
            os.replace(temporary, self._data(0))
        except BaseException:
            os.close(copy)
            temporary.unlink(missing_ok=True)
            raise
        return copy

    def _move(self, path: Path, joined: int, offset: int, nbytes: int) -> None:
        source = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            left = min(os.fstat(source).st_size, nbytes)
            # A power cut may keep the shorter length and lose the bytes behind it, so with fsync a
            # part is cut only once it is all on the disk elsewhere.
            step = left if self.fsync else STEP
            while left:
                start = max(0, left - step)
                for at in range(start, left, STEP):
                    piece = os.pread(source, min(STEP, left - at), at)
                    write_at(joined, [memoryview(piece)], offset + at)
                if self.fsync:
                    os.fsync(joined)
                os.ftruncate(source, start)
                left = start
        finally:
            os.close(source)
        path.unlink()

    def _assembled(self) -> bool:
        return self._target.exists()

    def _data(self, n: int) -> Path:
        return self.folder / f"data-{n}"

    def _record(self, n: int, part: Part) -> Path:
        return self.folder / f"part-{n}-{part.checksum}-{part.nbytes}"


class _InPlace(NewFile):
    """A part that is written to where it stays, behind all that are before it.

    Its lock keeps others from writing there, so what is behind ``start`` is this part's alone.
    """

    def __init__(self, fd: int, start: int, hasher: BlockHasher, nbytes: int | None) -> None:
        super().__init__(None, hasher, nbytes)
        self.fd, self.start = fd, start
        self.reserve(nbytes)

    def publish(self, target: Path, *, fsync: bool) -> None:
        """It has its place. Raises STORE_UNAVAILABLE where that is a copy that others left."""
        data = target.with_name("data-0")
        if not data.exists() or not os.path.samestat(os.fstat(self.fd), data.stat()):
            raise ServiceError(
                "STORE_UNAVAILABLE", "the part was overtaken while it stalled: send it again"
            )
        if fsync:
            os.fsync(self.fd)
        if target.exists():  # a writer was killed before its part counted
            target.unlink()
            if fsync:
                sync_folder(target.parent)

    def discard(self) -> None:
        """Give its room back."""
        if self.fd >= 0:
            with suppress(OSError):
                os.ftruncate(self.fd, self.start)
            self.close()


class FilePart(PartUpload):
    """See :class:`nexrl_payloads.PartUpload`."""

    def __init__(self, parts: FileParts, n: int, nbytes: int | None) -> None:
        self._parts = parts
        self._n = n
        what = f"part {n} of payload {parts.payload_id}"
        self._hasher = BlockHasher(what, nbytes, whole=True)
        self._file = parts.begin(n, self._hasher, nbytes)

    def write(self, *chunks: Chunk) -> None:
        self._file.write(*chunks)

    def commit(self, checksum: str | None) -> int:
        self._hasher.finish(checksum)
        part = Part(self._hasher.nbytes, self._hasher.checksum)
        with disk_errors():
            self._parts.add(self._n, part, self._file, self._hasher.table())
        self._file.discard()
        return part.nbytes

    def abort(self) -> None:
        self._file.discard()
