"""Frame: reads tensors, or rows of them, from a mapped file or a buffer."""

from __future__ import annotations

import mmap
import operator
import os
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeAlias

from ._checks import show
from ._errors import FrameClosed, HeaderTruncated, InvalidRows, UnknownTensor
from ._header import Header, parse_header
from ._limits import PREFIX_BYTES

if TYPE_CHECKING:
    import torch

    from ._numpy import Array, Bytes

Rows: TypeAlias = slice | Sequence[int] | None


class Frame:
    """A checked frame, read in place. Made by wrap() and open_frame(); use it as a context manager
    or close() it.

    Tensors are views of the frame's memory and keep it alive after close(), which only ends reading
    more of them.
    """

    __slots__ = ("_view", "header")

    def __init__(self, view: memoryview, header: Header) -> None:
        self._view: memoryview | None = view
        self.header = header

    def numpy(self, name: str, rows: Rows = None, *, widen: bool = False) -> Array:
        """The tensor, or rows of its dimension 0, as an array: a view, but new memory for a list of
        rows.

        A slice means what it means for lists (step above 0); a list holds indices from 0 to rows -
        1. Only the rows asked for are read. BF16 raises NoNumpyDtype, or becomes float32 with
        widen=True.
        """
        from ._numpy import to_numpy

        table, dtype, shape = self._select(name, rows)
        return to_numpy(table, dtype, shape, f"tensor {show(name)}", widen=widen)

    def torch(self, name: str, rows: Rows = None) -> torch.Tensor:
        """The tensor, or rows of its dimension 0, as a CPU tensor; rows as in numpy().

        A view over mapped files and writable buffers. Over read-only buffers (bytes) just what is
        asked for is copied.
        """
        from ._torch import to_torch

        return to_torch(*self._select(name, rows))

    def close(self) -> None:
        """Let go of the memory; it is freed, or unmapped, with the last tensor that views it."""
        self._view = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _select(self, name: str, rows: Rows) -> tuple[Bytes, str, tuple[int, ...]]:
        """The chosen rows of a tensor as [rows, bytes of a row] uint8, with dtype and resulting
        shape."""
        from ._numpy import byte_rows

        if self._view is None:
            raise FrameClosed(
                f"the frame was closed before tensor {show(name)} was read; read it before"
            )
        info = self.header.tensors.get(name)
        if info is None:
            raise UnknownTensor(
                f"the frame has no tensor {show(name)}; it has {show(sorted(self.header.tensors))}"
            )
        start = self.header.data_start
        table = byte_rows(self._view[start + info.start : start + info.end], info.shape)
        if rows is None:
            return table, info.dtype, info.shape
        if not info.shape:
            raise InvalidRows(
                f"tensor {show(name)} has 0 dimensions, so it has no rows to choose from"
            )
        table = table[_check_rows(rows, info.shape[0], f"tensor {show(name)}")]
        return table, info.dtype, (table.shape[0], *info.shape[1:])


def wrap(buffer: bytes | bytearray | memoryview | mmap.mmap) -> Frame:
    """A frame over a buffer that holds exactly one, without a copy. Raises CodecError's
    subclasses."""
    view = memoryview(buffer).cast("B")
    return Frame(view, parse_header(view, len(view)))


def open_frame(path: str | os.PathLike[str]) -> Frame:
    """A frame over a mapped file: only the header is read now, and each tensor's pages when they
    are touched.

    Writing to a tensor changes this process's private pages, never the file. The file must not
    shrink while mapped (replace files by rename). Raises OSError, or CodecError's subclasses for a
    file that is no exact frame.
    """
    return wrap(map_file(path))


def map_file(path: str | os.PathLike[str]) -> mmap.mmap:
    """A file as private memory, as :func:`open_frame` maps it. Raises HeaderTruncated where it is
    too short."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < PREFIX_BYTES:  # an empty file cannot be mapped at all
            raise HeaderTruncated(
                f"the file has {size} bytes; a frame starts with {PREFIX_BYTES} of header length"
            )
        # Private and writable, because torch has no read-only tensors and warns about memory that
        # is.
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)


def _check_rows(rows: slice | Sequence[int], count: int, what: str) -> slice | list[int]:
    if isinstance(rows, slice):
        try:
            start, stop, step = rows.indices(count)
        except (TypeError, ValueError) as error:
            raise InvalidRows(f"{what} cannot be read with {show(rows)}: {error}") from None
        if step < 1:
            raise InvalidRows(
                f"{what} cannot be read with step {step}; give a step above 0, or a list of rows"
            )
        return slice(start, max(start, stop), step)
    try:
        chosen = [operator.index(row) for row in rows]
    except TypeError:
        raise InvalidRows(
            f"{what} cannot be read with rows {show(rows)}; give a slice or a list of integers"
        ) from None
    for row in chosen:
        if not 0 <= row < count:
            raise InvalidRows(f"{what} has {count} rows; row {show(row)} is not one of them")
    return chosen
