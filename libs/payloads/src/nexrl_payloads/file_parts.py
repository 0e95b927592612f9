"""Parts of one payload in a folder: each is a file of its own until all are put together.

``.parts-ID/`` holds

- ``part-N-CHECKSUM-NBYTES``  the record of part N: the table of its blocks' checksums. The part
  counts from the moment that this file is there, and is never replaced by another
- ``data-N``  its bytes. Putting the payload together moves all others behind those of part 0,
  whose file then becomes the payload
- ``tmp-*``   one being written; the sweep takes those of killed writers
- ``lock``    held while a part begins to count and while the payload is put together

So a payload is put together already where ``data-0`` has gone and the payload is there.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from .checks import BlockHasher, tables_checksum
from .files import NewFile, disk_errors, locked, replace_file, sync_folder, unique, write_at
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

    def begin(self, n: int, nbytes: int | None) -> FilePart:
        """Begin to write part ``n``; one that is there, or comes too late, is only hashed."""
        with disk_errors(), suppress(FileExistsError):
            self.folder.mkdir(mode=0o700)
            if self.fsync:
                sync_folder(self.folder.parent)
        return FilePart(self, n, nbytes, keep=n not in self.present() and not self._assembled())

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
            if known is not None or not file.kept or self._assembled():
                check_same(self.payload_id, n, known, part)
                return
            # A crash between these two leaves bytes that do not count and are written over.
            file.publish(self._data(n), fsync=self.fsync)
            replace_file(self._record(n, part), table, fsync=self.fsync)

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
        """Move the bytes of all parts behind those of part 0.

        A part's file loses from its end what is in its place, so the payload is never there twice,
        and whoever goes on after a crash finds how far it came by the length of the file.
        """
        joined = os.open(self._data(0), os.O_RDWR | os.O_CLOEXEC)
        try:
            offset = parts[0].nbytes
            for n in range(1, len(parts)):
                with suppress(FileNotFoundError):  # moved before a crash
                    self._move(self._data(n), joined, offset, parts[n].nbytes)
                offset += parts[n].nbytes
            if self.fsync:
                os.fsync(joined)
        finally:
            os.close(joined)

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


class FilePart(PartUpload):
    """See :class:`nexrl_payloads.PartUpload`."""

    def __init__(self, parts: FileParts, n: int, nbytes: int | None, *, keep: bool) -> None:
        self._parts = parts
        self._n = n
        what = f"part {n} of payload {parts.payload_id}"
        self._hasher = BlockHasher(what, nbytes, whole=True)
        temporary = parts.folder / unique("tmp-") if keep else None
        self._file = NewFile(temporary, self._hasher, nbytes)

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
