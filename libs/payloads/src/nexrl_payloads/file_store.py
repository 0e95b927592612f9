"""Payloads as files of one folder, which gateway and ranks share; ranks map them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from mmap import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tensor_codec import Frame, Header, map_file, open_frame, wrap

from .common import (
    PIECE,
    Sums,
    as_malformed,
    check_id,
    check_part,
    damaged,
    not_found,
    row_spans,
    verified_head,
    verified_pieces,
)
from .file_part_uploads import begin_part
from .file_parts import PartsFolder, parts_folder
from .file_sweep import remove_parts, sweep_folder
from .file_uploads import TEMPORARY, FileUpload, sums_path
from .files import create_file, disk_errors, store_unavailable, unique, write_at
from .protocol import Chunk, PartUpload, Rows, StoredPayload

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


class FilePayload:
    """See :class:`nexrl_payloads.Payload`: a mapped file, of which only the touched pages are
    read."""

    def __init__(self, frame: Frame, blocks: _Blocks | None) -> None:
        self._frame = frame
        self._blocks = blocks

    @property
    def header(self) -> Header:
        return self._frame.header

    @property
    def nbytes(self) -> int:
        return self._frame.header.total_size

    def torch(self, name: str, rows: Rows = None) -> torch.Tensor:
        self.check(name, rows)
        return self._frame.torch(name, rows)

    def numpy(self, name: str, rows: Rows = None) -> NDArray[Any]:
        self.check(name, rows)
        return self._frame.numpy(name, rows)

    def check(self, name: str, rows: Rows = None) -> None:
        if self._blocks is not None:
            _, spans, _ = row_spans(name, self.header, rows)
            self._blocks.check(spans, self.header)

    def close(self) -> None:
        self._frame.close()
        self._blocks = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Blocks:
    """The blocks of a mapped file, each compared with its checksum once."""

    def __init__(self, memory: mmap, sums: Sums) -> None:
        self._memory = memoryview(memory)
        self._sums = sums
        self._sound = bytearray(len(sums.borders))

    def head(self) -> None:
        """Compare those that hold the header."""
        verified_head(self._sums, lambda start, end: self._memory[start:end])

    def check(self, spans: Sequence[tuple[int, int]], header: Header) -> None:
        """Compare those that hold the spans; raises PAYLOAD_DAMAGED."""
        borders = self._sums.borders
        for start, end in spans:
            for block in self._sums.covering(start, end):
                if not self._sound[block]:
                    self._sums.check(
                        block, self._memory[borders[block] : borders[block + 1]], header
                    )
                    self._sound[block] = 1


class FileStore:
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

    def put(self, payload_id: str, buffers: Iterable[Chunk]) -> StoredPayload:
        with self.create(payload_id) as upload:
            for buffer in (
                buffers
            ):  # not *buffers: a frame's len() is bytes, and would size the list of arguments
                upload.write(buffer)
            return upload.commit()

    def put_part(self, payload_id: str, n: int, nbytes: int | None = None) -> PartUpload:
        return begin_part(self._parts(payload_id), check_part(n), nbytes)

    def parts(self, payload_id: str) -> list[int]:
        return sorted(self._parts(payload_id).present())

    def assemble(self, payload_id: str, count: int) -> StoredPayload:
        return self._parts(payload_id).assemble(count)

    def open(self, payload_id: str, checksum: str | None = None) -> FilePayload:
        path = self._path(payload_id)
        with as_malformed(payload_id), disk_errors():
            try:
                if checksum is None:
                    return FilePayload(open_frame(path), None)
                sums = self._sums(payload_id, checksum, path.stat().st_size)
                memory = map_file(path)
            except FileNotFoundError:
                raise not_found(payload_id) from None
            blocks = _Blocks(memory, sums)
            blocks.head()
            return FilePayload(wrap(memory), blocks)

    def stream(self, payload_id: str, checksum: str | None = None) -> Iterator[bytes]:
        path = self._path(payload_id)
        with disk_errors():
            try:
                file = path.open("rb", buffering=0)
            except FileNotFoundError:
                raise not_found(payload_id) from None
            try:
                nbytes = os.fstat(file.fileno()).st_size
                sums = None if checksum is None else self._sums(payload_id, checksum, nbytes)
            except BaseException:
                file.close()
                raise

        def pieces() -> Iterator[bytes]:
            with file, disk_errors():
                if sums is not None:
                    yield from verified_pieces(
                        sums, lambda start, end: file.read(end - start) or b""
                    )
                    return
                while piece := file.read(PIECE):
                    yield piece

        return pieces()

    def nbytes(self, payload_id: str) -> int:
        try:
            return self._path(payload_id).stat().st_size
        except FileNotFoundError:
            pass
        present = self._parts(payload_id).present()
        if not present:
            raise not_found(payload_id)
        return sum(part.nbytes for part in present.values())

    def local_path(self, payload_id: str) -> Path:
        path = self._path(payload_id)
        if not path.is_file():
            raise not_found(payload_id)
        return path

    def delete(self, payload_id: str) -> None:
        path = self._path(payload_id)
        with disk_errors():
            path.unlink(missing_ok=True)
            sums_path(self._folder, payload_id).unlink(missing_ok=True)
            remove_parts(parts_folder(self._folder, payload_id))

    def touch(self, payload_id: str) -> None:
        touched = False
        for path in (self._path(payload_id), parts_folder(self._folder, payload_id)):
            try:
                os.utime(path)
                touched = True
            except FileNotFoundError:
                continue
        if not touched:
            raise not_found(payload_id)

    def sweep(self, in_use: set[str], *, result_age_s: float, upload_age_s: float) -> list[str]:
        with disk_errors():
            return sweep_folder(
                self._folder, in_use, result_age_s=result_age_s, upload_age_s=upload_age_s
            )

    def check(self) -> None:
        path = self._folder / unique(f"{TEMPORARY}check-")
        try:
            fd = create_file(path)
            try:
                write_at(fd, [memoryview(b"x")], 0)
            finally:
                os.close(fd)
                path.unlink(missing_ok=True)
        except OSError as error:
            raise store_unavailable("cannot be written", error) from error

    def _sums(self, payload_id: str, checksum: str, nbytes: int) -> Sums:
        """The checksums of a payload of so many bytes; raises PAYLOAD_DAMAGED where they are not
        its own."""
        try:
            tables = sums_path(self._folder, payload_id).read_bytes()
        except FileNotFoundError:
            if not self._path(payload_id).exists():  # deleted meanwhile
                raise not_found(payload_id) from None
            raise damaged(payload_id, "the checksums beside it") from None
        sums = Sums(payload_id, tables, checksum)
        if sums.nbytes != nbytes:
            raise damaged(payload_id, f"the length ({nbytes} bytes now, {sums.nbytes} stored)")
        return sums

    def _path(self, payload_id: str) -> Path:
        return self._folder / check_id(payload_id)

    def _parts(self, payload_id: str) -> PartsFolder:
        return PartsFolder(self._folder, check_id(payload_id), fsync=self._fsync)
