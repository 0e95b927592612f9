"""The two ways in which a new part comes in: in its turn, before its turn."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Self

from nexrl_contract.errors import ServiceError

from .common import Tally, byte_views
from .file_parts import Part, PartsFolder, Tail
from .files import create_file, disk_errors, reserve, unique, write_at
from .protocol import Chunk, PartUpload
from .repeated import RepeatedPart


def begin_part(parts: PartsFolder, n: int, nbytes: int | None) -> PartUpload:
    """Decide how part ``n`` is taken in: compared, written in place, or set aside."""
    with disk_errors():
        known, assembled, tail = parts.look(n)
        if known is not None or assembled:
            return RepeatedPart(parts.payload_id, n, nbytes, known)
        return AsidePart(parts, n, nbytes) if tail is None else TailPart(parts, n, nbytes, tail)


class _WrittenPart:
    """A part whose bytes go into an open file from ``start`` on."""

    def __init__(self, parts: PartsFolder, n: int, nbytes: int | None, fd: int, start: int) -> None:
        self._parts = parts
        self._n = n
        self._fd = fd
        self._start = start
        self._what = f"part {n} of payload {parts.payload_id}"
        self._tally = Tally(self._what, nbytes, whole=True)
        try:
            with disk_errors():
                reserve(fd, start, nbytes or 0)
        except ServiceError:
            self.abort()
            raise

    def write(self, *chunks: Chunk) -> None:
        views = byte_views(chunks)
        offset = self._start + self._tally.nbytes
        self._tally.add(views)
        with disk_errors():
            write_at(self._fd, views, offset)

    def commit(self, checksum: str | None) -> int:
        self._tally.finish()
        self._tally.verify(checksum)
        with disk_errors():
            self._parts.keep_sums(self._n, self._tally.checksum, self._tally.sums())
            self._finish(Part(self._tally.nbytes, self._tally.checksum))
        self._close()
        return self._tally.nbytes

    def abort(self) -> None:
        if self._fd >= 0:
            self._discard()
            self._close()

    def _finish(self, part: Part) -> None:
        raise NotImplementedError

    def _discard(self) -> None:
        raise NotImplementedError

    def _close(self) -> None:
        os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.abort()


class TailPart(_WrittenPart):
    """The next part, written to its final place."""

    def __init__(self, parts: PartsFolder, n: int, nbytes: int | None, tail: Tail) -> None:
        self._tail = tail
        super().__init__(parts, n, nbytes, tail.fd, tail.end)

    def _finish(self, part: Part) -> None:
        if not self._parts.append(self._tail, self._n, part):
            raise ServiceError(
                "STORE_UNAVAILABLE", f"{self._what} was overtaken while it stalled: send it again"
            )
        with suppress(
            OSError
        ):  # this part counts; what stops the merge shows when the payload is put together
            self._parts.merge(self._tail)

    def _discard(self) -> None:
        with suppress(OSError):
            self._parts.give_back(self._tail)


class AsidePart(_WrittenPart):
    """A part before its turn, or while another writer holds the tail: a file of its own until it is
    merged."""

    def __init__(self, parts: PartsFolder, n: int, nbytes: int | None) -> None:
        self._temporary = parts.path / unique("tmp-")
        super().__init__(parts, n, nbytes, create_file(self._temporary), 0)

    def _finish(self, part: Part) -> None:
        if self._parts.fsync:
            os.fsync(self._fd)
        self._parts.set_aside(self._temporary, self._n, part)
        with suppress(OSError):  # as above
            self._parts.merge_unless_busy()

    def _discard(self) -> None:
        self._temporary.unlink(missing_ok=True)
