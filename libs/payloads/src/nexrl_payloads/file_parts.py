"""Parts of one payload in a folder: a growing file that in-order parts are written straight into.

``.parts-ID/`` holds

- ``index``   JSON: name of the growing file, the parts that it holds, whether it became the payload
- ``data-*``  the growing file; who writes behind its last part holds its lock, which dies with the
  writer
- ``part-N-CHECKSUM-NBYTES``  a part that came before its turn; ``tmp-*`` one being written
- ``sums-N-CHECKSUM``  the checksums of a part's blocks, written before the part counts
- ``lock``    held for moments, while the index is read and replaced

Bytes of the growing file behind the parts in the index are an abandoned write; the next writer
overwrites them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nexrl_contract.errors import ServiceError

from .common import check_count, not_found, same_part, sums_checksum
from .file_uploads import sums_path
from .files import (
    copy_bytes,
    create_file,
    disk_errors,
    locked,
    replace_file,
    sync_folder,
    try_lock,
    unique,
)
from .protocol import StoredPayload

PARTS = ".parts-"
_TAIL_PATIENCE_S = 2.0


class Part(NamedTuple):
    """A part that is there."""

    nbytes: int
    checksum: str


@dataclass(slots=True)
class Index:
    """What the growing file holds; the list of parts has no gap."""

    file: str
    parts: list[Part]
    assembled: bool = False

    @property
    def end(self) -> int:
        """Bytes of the growing file that count."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Tail:
    """The right to write behind the last part: an open, locked growing file."""

    fd: int
    file: str
    end: int


def parts_folder(folder: Path, payload_id: str) -> Path:
    """Where a payload's parts are."""
    return folder / f"{PARTS}{payload_id}"


class PartsFolder:
    """The parts of one payload; every state is on disk, so any number of these may work on it at
    once."""

    def __init__(self, folder: Path, payload_id: str, *, fsync: bool) -> None:
        self.path = parts_folder(folder, payload_id)
        self.payload_id = payload_id
        self.fsync = fsync
        self._target = folder / payload_id

    def look(self, n: int) -> tuple[Part | None, bool, Tail | None]:
        """Part ``n`` if it is there, whether all is put together, and the tail if ``n`` is next and
        it is free."""
        with suppress(FileExistsError):
            self.path.mkdir(mode=0o700)
            if self.fsync:
                sync_folder(self.path.parent)
        with self.lock():
            index = self.index()
            known = self.known(index, n)
            next_in_line = known is None and n == len(index.parts)
            return known, index.assembled, self._try_tail(index) if next_in_line else None

    def present(self) -> dict[int, Part]:
        """All parts that are there."""
        with disk_errors():
            asides = self._asides()  # first, because parts move from there into the index
            return asides | dict(enumerate(self.index().parts))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the index for a moment."""
        with locked(self.path / "lock"):
            yield

    def index(self) -> Index:
        """The index as it is on disk; an empty one where there is none yet."""
        try:
            stored = json.loads((self.path / "index").read_bytes())
        except FileNotFoundError:
            return Index("data-0", [])
        return Index(stored["file"], [Part(*part) for part in stored["parts"]], stored["assembled"])

    def known(self, index: Index, n: int) -> Part | None:
        """Part ``n`` if it is there."""
        return index.parts[n] if n < len(index.parts) else self._asides().get(n)

    def keep_sums(self, n: int, checksum: str, sums: bytes) -> None:
        """Write down the checksums of the blocks of part ``n``, which is about to count."""
        replace_file(self.path / f"sums-{n}-{checksum}", sums, fsync=self.fsync)

    def append(self, tail: Tail, n: int, part: Part) -> bool:
        """Make the bytes behind the last part count as part ``n``; False if ``tail`` is no longer
        its tail."""
        if self.fsync:
            os.fsync(tail.fd)
        with self.lock():
            index = self.index()
            known = self.known(index, n)
            if known is not None:
                same_part(self.payload_id, n, known, part)
            if index.file != tail.file or len(index.parts) != n:
                return known is not None
            index.parts.append(part)
            self._store(index)
            self._aside_path(n, part).unlink(missing_ok=True)
        return True

    def set_aside(self, temporary: Path, n: int, part: Part) -> None:
        """Make a written file count as part ``n``, which comes before its turn."""
        with self.lock():
            known = self.known(self.index(), n)
            if known is not None:
                same_part(self.payload_id, n, known, part)
                temporary.unlink()
                return
            os.replace(temporary, self._aside_path(n, part))
            if self.fsync:
                sync_folder(self.path)

    def give_back(self, tail: Tail) -> None:
        """Free the room of an abandoned write, if its part does not count after all."""
        with self.lock():
            if self.index().end == tail.end:
                os.ftruncate(tail.fd, tail.end)

    def merge_unless_busy(self) -> None:
        """Append the parts whose turn has come, unless another writer has the tail and will do
        it."""
        with self.lock():
            index = self.index()
            tail = self._try_tail(index) if len(index.parts) in self._asides() else None
        if tail is None:
            return
        try:
            self.merge(tail)
        finally:
            os.close(tail.fd)

    def merge(self, tail: Tail) -> None:
        """Append the parts whose turn has come."""
        while True:
            index = self.index()
            n = len(index.parts)
            part = self._asides().get(n)
            if part is None or index.file != tail.file:
                return
            source = os.open(self._aside_path(n, part), os.O_RDONLY | os.O_CLOEXEC)
            try:
                copy_bytes(source, tail.fd, 0, index.end, part.nbytes)
            finally:
                os.close(source)
            self.append(tail, n, part)

    def assemble(self, count: int) -> StoredPayload:
        """See :meth:`nexrl_payloads.PayloadStore.assemble`."""
        with disk_errors():
            if not self.path.exists():
                check_count(self.payload_id, [], count)
            if not self.index().assembled:
                check_count(self.payload_id, sorted(self.present()), count)
            tail = self._take_tail()
            try:
                if tail is not None:
                    self.merge(tail)
                with self.lock():
                    return self._publish(count, tail)
            finally:
                if tail is not None:
                    os.close(tail.fd)

    def _publish(self, count: int, tail: Tail | None) -> StoredPayload:
        """Turn the growing file into the payload; a crash in between is made good by the next
        call."""
        index = self.index()
        if tail is not None and tail.file != index.file:
            raise ServiceError(
                "STORE_UNAVAILABLE",
                f"payload {self.payload_id} is put together elsewhere: try again",
            )
        check_count(self.payload_id, range(len(index.parts)), count)
        if tail is not None and not index.assembled:
            os.ftruncate(tail.fd, index.end)
            if self.fsync:
                os.fsync(tail.fd)
            index.assembled = True
            self._store(index)
        sums = b"".join(
            (self.path / f"sums-{n}-{part.checksum}").read_bytes()
            for n, part in enumerate(index.parts)
        )
        replace_file(sums_path(self._target.parent, self.payload_id), sums, fsync=self.fsync)
        try:
            os.replace(self.path / index.file, self._target)
        except FileNotFoundError:
            if not self._target.exists():
                raise not_found(self.payload_id) from None
        for path in (self._target, self.path):  # whoever asks again needs both
            os.utime(path)
        if self.fsync:
            sync_folder(self._target.parent)
        return StoredPayload(self.payload_id, index.end, sums_checksum(sums))

    def _try_tail(self, index: Index) -> Tail | None:
        """The tail, unless another writer has it. Called with the index locked, so that the tail
        fits the index."""
        if index.assembled:
            return None
        fd = os.open(self.path / index.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if try_lock(fd):
            return Tail(fd, index.file, index.end)
        os.close(fd)
        return None

    def _take_tail(self) -> Tail | None:
        """The tail, from a stalled writer too; None once the payload is assembled.

        All parts are there, so whoever still writes repeats one of them, and may hang for as long
        as its connection does: after a moment the parts go on in a copy, and that write ends in a
        file that is no part of anything.
        """
        deadline = time.monotonic() + _TAIL_PATIENCE_S
        while time.monotonic() < deadline:
            with self.lock():
                index = self.index()
                tail = self._try_tail(index)
            if tail is not None or index.assembled:
                return tail
            time.sleep(0.01)
        with self.lock():
            return self._fork(self.index())

    def _fork(self, index: Index) -> Tail | None:
        if index.assembled:
            return None
        old = self.path / index.file
        index.file = unique("data-")
        fd = create_file(self.path / index.file)
        source = os.open(old, os.O_RDONLY | os.O_CLOEXEC)
        try:
            copy_bytes(source, fd, 0, 0, index.end)
            try_lock(fd)
            self._store(index)
        except BaseException:
            os.close(fd)
            (self.path / index.file).unlink(missing_ok=True)
            raise
        finally:
            os.close(source)
        old.unlink(missing_ok=True)
        return Tail(fd, index.file, index.end)

    def _store(self, index: Index) -> None:
        stored = {"file": index.file, "parts": index.parts, "assembled": index.assembled}
        replace_file(self.path / "index", json.dumps(stored).encode(), fsync=self.fsync)

    def _asides(self) -> dict[int, Part]:
        found = {}
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return {}
        for name in names:
            if name.startswith("part-"):
                n, checksum, nbytes = name.removeprefix("part-").split("-")
                found[int(n)] = Part(int(nbytes), checksum)
        return found

    def _aside_path(self, n: int, part: Part) -> Path:
        return self.path / f"part-{n}-{part.checksum}-{part.nbytes}"
