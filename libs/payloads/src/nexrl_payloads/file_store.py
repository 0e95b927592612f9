"""Payloads as files of one folder, which gateway and ranks share; ranks map them."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from mmap import mmap
from pathlib import Path
from typing import TYPE_CHECKING

from tensor_codec import map_file, row_spans, wrap

from .checks import BlockChecksums, BlockHasher, damaged, pieces, tables_checksum
from .file_parts import PARTS, SUMS, FilePart, FileParts
from .files import NewFile, disk_errors, replace_file, store_unavailable, unique
from .protocol import Chunk, Payload, PayloadStore, Rows, StoredPayload, Upload
from .rules import age_limit, as_malformed, check_id, check_part, is_id, not_found

if TYPE_CHECKING:
    import torch

_TEMPORARY = ".tmp-"
_GONE = ".gone-"


class FilePayload(Payload):
    """See :class:`nexrl_payloads.Payload`: a mapped file, of which only the touched pages are
    read; each of its blocks is compared with its checksum once."""

    mapped = True

    def __init__(self, memory: mmap, checksums: BlockChecksums | None) -> None:
        """Raises CodecError where the bytes are no frame, PAYLOAD_DAMAGED for the header."""
        self._checksums = checksums
        self._memory = memoryview(memory)
        if checksums is not None:
            checksums.head(lambda start, end: self._memory[start:end])
            self._sound = bytearray(len(checksums.borders))
        self._frame = wrap(memory)
        self.header = self._frame.header
        self.nbytes = self.header.total_size

    def torch(self, name: str, rows: Rows = None) -> torch.Tensor:
        self.check(name, rows)
        return self._frame.torch(name, rows)

    def check(self, name: str, rows: Rows = None) -> None:
        checksums = self._checksums
        if checksums is None:
            return
        for start, end in row_spans(self.header, name, rows)[1]:
            for block in checksums.covering(start, end):
                if not self._sound[block]:
                    first, stop = checksums.borders[block : block + 2]
                    checksums.check(block, self._memory[first:stop], self.header)
                    self._sound[block] = 1

    def close(self) -> None:
        self._frame.close()
        self._checksums = None
        self._memory = memoryview(b"")


class FileUpload(Upload):
    """A temporary file, renamed when it is complete."""

    def __init__(self, folder: Path, payload_id: str, nbytes: int | None, *, fsync: bool) -> None:
        self._folder = folder
        self._id = payload_id
        self._fsync = fsync
        self._hasher = BlockHasher(f"payload {payload_id}", nbytes)
        self._file = NewFile(folder / unique(f"{_TEMPORARY}{payload_id}-"), self._hasher, nbytes)

    def write(self, *chunks: Chunk) -> None:
        self._file.write(*chunks)

    def commit(self) -> StoredPayload:
        self._hasher.finish()
        table = self._hasher.table()
        with disk_errors():
            # The checksums come first: a payload is there only with its own.
            replace_file(self._folder / f"{SUMS}{self._id}", table, fsync=self._fsync)
            self._file.publish(self._folder / self._id, fsync=self._fsync)
        return StoredPayload(self._id, self._hasher.nbytes, tables_checksum(table))

    def abort(self) -> None:
        self._file.discard()


class FileStore(PayloadStore):
    """See :class:`nexrl_payloads.PayloadStore`.

    ``ID`` is a payload, ``.sums-ID`` the checksums of its blocks, ``.tmp-ID-*`` one being written,
    ``.parts-ID/`` its parts (see ``file_parts``). All state is in the folder, so gateways may come,
    go and share it.
    """

    def __init__(self, folder: Path, *, fsync: bool) -> None:
        self._folder = folder
        self._fsync = fsync
        with disk_errors():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def create(self, payload_id: str, nbytes: int | None = None) -> FileUpload:
        return FileUpload(self._folder, check_id(payload_id), nbytes, fsync=self._fsync)

    def put_part(self, payload_id: str, n: int, nbytes: int | None = None) -> FilePart:
        return FilePart(self._parts(payload_id), check_part(n), nbytes)

    def parts(self, payload_id: str) -> list[int]:
        return list(self._parts(payload_id).present())

    def assemble(self, payload_id: str, count: int) -> StoredPayload:
        return self._parts(payload_id).assemble(count)

    def open(self, payload_id: str, checksum: str | None = None) -> FilePayload:
        path = self._path(payload_id)
        with as_malformed(payload_id), disk_errors():
            try:
                checksums = self._checksums(payload_id, checksum, path.stat().st_size)
                return FilePayload(map_file(path), checksums)
            except FileNotFoundError:
                raise not_found(payload_id) from None

    def stream(self, payload_id: str, checksum: str | None = None) -> Iterator[bytes]:
        with disk_errors():
            try:
                fd = os.open(self._path(payload_id), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise not_found(payload_id) from None
            file = open(fd, "rb", buffering=0)  # noqa: SIM115 - closed by the generator, or below
            try:
                nbytes = os.fstat(fd).st_size
                checksums = self._checksums(payload_id, checksum, nbytes)
            except BaseException:
                file.close()
                raise

        def stream() -> Iterator[bytes]:
            with file, disk_errors():
                yield from pieces(
                    nbytes, lambda start, end: os.pread(fd, end - start, start), checksums
                )

        return stream()

    def nbytes(self, payload_id: str) -> int:
        with suppress(FileNotFoundError):
            return self._path(payload_id).stat().st_size
        present = self._parts(payload_id).present()
        if not present:
            raise not_found(payload_id)
        return sum(part.nbytes for part in present.values())

    def delete(self, payload_id: str) -> None:
        self._path(payload_id)
        with disk_errors():
            self._remove(payload_id)
            self._remove_parts(self._folder / f"{PARTS}{payload_id}")

    def sweep(self, in_use: set[str], *, result_age_s: float, upload_age_s: float) -> list[str]:
        removed = set()
        with disk_errors():
            for path in list(self._folder.iterdir()):
                if path.name.startswith(_GONE):
                    shutil.rmtree(path, ignore_errors=True)
                    continue
                payload_id, limit = _owner(path, result_age_s, upload_age_s)
                if payload_id is None or payload_id in in_use or _age_s(path) < limit:
                    continue
                removed.add(payload_id)
                if path.name.startswith(PARTS):
                    self._remove_parts(path)
                elif path.name == payload_id:
                    self._remove(payload_id)
                else:
                    path.unlink(missing_ok=True)
        return sorted(removed)

    def check(self) -> None:
        path = self._folder / unique(f"{_TEMPORARY}check-")
        try:
            try:
                path.write_bytes(b"x")
            finally:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise store_unavailable("cannot be written", error) from error

    def _remove(self, payload_id: str) -> None:
        (self._folder / payload_id).unlink(missing_ok=True)
        (self._folder / f"{SUMS}{payload_id}").unlink(missing_ok=True)

    def _remove_parts(self, folder: Path) -> None:
        """Remove a folder of parts; it vanishes at once, so that nobody sees a half-removed one."""
        gone = folder.with_name(unique(_GONE))
        with suppress(FileNotFoundError):
            folder.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    def _checksums(
        self, payload_id: str, checksum: str | None, nbytes: int
    ) -> BlockChecksums | None:
        """The checksums of a payload of so many bytes; raises PAYLOAD_DAMAGED where they are not
        its own."""
        if checksum is None:
            return None
        try:
            tables = (self._folder / f"{SUMS}{payload_id}").read_bytes()
        except FileNotFoundError:
            if not self._path(payload_id).exists():  # deleted meanwhile
                raise not_found(payload_id) from None
            raise damaged(payload_id, "the checksums beside it") from None
        return BlockChecksums(payload_id, tables, checksum, nbytes)

    def _path(self, payload_id: str) -> Path:
        return self._folder / check_id(payload_id)

    def _parts(self, payload_id: str) -> FileParts:
        return FileParts(self._folder, check_id(payload_id), fsync=self._fsync)


def _owner(path: Path, result_age_s: float, upload_age_s: float) -> tuple[str | None, float]:
    """The payload that an entry belongs to, None for a stranger, and the age that it may reach."""
    name = path.name
    if name.startswith(_TEMPORARY):
        return name.removeprefix(_TEMPORARY).rpartition("-")[0], upload_age_s
    if name.startswith(PARTS):
        return name.removeprefix(PARTS), upload_age_s
    if name.startswith(SUMS):  # they go with their payload; by themselves only where it never came
        payload_id = name.removeprefix(SUMS)
        return (None if path.with_name(payload_id).exists() else payload_id), upload_age_s
    mine = is_id(name) and path.is_file()
    return (name if mine else None), age_limit(name, result_age_s, upload_age_s)


def _age_s(path: Path) -> float:
    """Seconds since the entry, or a file in it, was last written; 0 if it has just gone."""
    try:
        times = [path.stat().st_mtime]
        if path.is_dir():
            times += [inner.stat().st_mtime for inner in path.iterdir()]
    except FileNotFoundError:
        return 0.0
    return time.time() - max(times)
