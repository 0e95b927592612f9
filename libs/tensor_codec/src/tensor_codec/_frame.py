"""encode makes a frame of tensors; Frame reads tensors, or rows of them, from a file or buffer."""

from __future__ import annotations

import mmap
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeAlias

from ._checks import ITEMSIZE, MAX_TENSORS, PREFIX_BYTES, check_metadata, check_name, show
from ._errors import FrameClosed, HeaderTruncated, InvalidRows, TooManyTensors, UnknownTensor
from ._header import Header, TensorInfo, parse_header, write_header
from ._raw import AnyTensor, to_raw

if TYPE_CHECKING:
    import torch

    from ._convert import Array, Bytes

Rows: TypeAlias = slice | Sequence[int] | None


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """An encoded frame. Iterating gives header and buffers, len() the bytes: HTTP clients stream it
    with a length.

    The buffers are views: they keep the tensors' memory alive, and what is written to the tensors
    shows in them. Tensors without elements have no buffer. header is prefix, JSON and padding;
    nbytes is the whole frame. Loop over it rather than list() or unpack it: these take len() as a
    hint and reserve a pointer for every byte.
    """

    header: bytes
    buffers: list[memoryview]
    nbytes: int

    def __iter__(self) -> Iterator[bytes | memoryview]:
        yield self.header
        yield from self.buffers

    def __len__(self) -> int:
        return self.nbytes

    def tobytes(self) -> bytes:
        """The whole frame in one new bytes object: the one copy this package makes of a contiguous
        tensor."""
        return b"".join([self.header, *self.buffers])


def encode(tensors: Mapping[str, AnyTensor], metadata: Mapping[str, str] | None = None) -> Encoded:
    """Encode tensors without copying those that are contiguous on the CPU; the same input gives the
    same bytes.

    Others are copied, their own elements only. Data is ordered by element size (largest first),
    then name, so each tensor is aligned. Raises CodecError's subclasses for what no reader would
    accept.
    """
    if len(tensors) > MAX_TENSORS:
        raise TooManyTensors(f"{len(tensors)} tensors were given; the limit is {MAX_TENSORS}")
    raws = {
        check_name(name): to_raw(value, f"tensor {show(name)}") for name, value in tensors.items()
    }
    order = sorted(raws.items(), key=lambda item: (-ITEMSIZE[item[1].dtype], item[0]))
    views = [
        memoryview(raw.data).cast("B") if memoryview(raw.data).nbytes else memoryview(b"")
        for _, raw in order
    ]
    header = write_header(
        [
            (name, raw.dtype, raw.shape, view.nbytes)
            for (name, raw), view in zip(order, views, strict=True)
        ],
        check_metadata(metadata or {}),
    )
    return Encoded(
        header,
        [view for view in views if view.nbytes],
        len(header) + sum(view.nbytes for view in views),
    )


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
        from ._convert import to_numpy

        table, dtype, shape = self._select(name, rows)
        return to_numpy(table, dtype, shape, f"tensor {show(name)}", widen=widen)

    def torch(self, name: str, rows: Rows = None) -> torch.Tensor:
        """The tensor, or rows of its dimension 0, as a CPU tensor; rows as in numpy().

        A view over mapped files and writable buffers. Over read-only buffers (bytes) just what is
        asked for is copied.
        """
        from ._convert import to_torch

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
        from ._convert import byte_rows

        if self._view is None:
            raise FrameClosed(
                f"the frame was closed before tensor {show(name)} was read; read it before"
            )
        info, chosen, shape = _choose(self.header, name, rows)
        start = self.header.data_start
        table = byte_rows(self._view[start + info.start : start + info.end], info.shape)
        return table if chosen is None else table[chosen], info.dtype, shape


def row_spans(
    header: Header, name: str, rows: Rows = None
) -> tuple[TensorInfo, list[tuple[int, int]], tuple[int, ...]]:
    """A tensor, where its rows are, and their shape ``[len(rows), ...]``, for readers of a frame
    that is not in memory.

    The spans are (start, end) bytes from the start of the frame, in the order of the rows;
    neighbours are one span. Raises UnknownTensor and InvalidRows as Frame does.
    """
    info, chosen, shape = _choose(header, name, rows)
    base = header.data_start + info.start
    if chosen is None:
        return info, [(base, base + info.nbytes)], shape
    count = info.shape[0]
    row_bytes = info.nbytes // count if count else 0
    spans: list[tuple[int, int]] = []
    for row in range(count)[chosen] if isinstance(chosen, slice) else chosen:
        start = base + row * row_bytes
        if spans and spans[-1][1] == start:
            start = spans.pop()[0]
        spans.append((start, base + (row + 1) * row_bytes))
    return info, spans, shape


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


def _choose(
    header: Header, name: str, rows: Rows
) -> tuple[TensorInfo, slice | list[int] | None, tuple[int, ...]]:
    """A tensor, the checked rows (None: all of them), and the shape that they have."""
    info = header.tensors.get(name)
    if info is None:
        raise UnknownTensor(
            f"the frame has no tensor {show(name)}; it has {show(sorted(header.tensors))}"
        )
    if rows is None:
        return info, None, info.shape
    if not info.shape:
        raise InvalidRows(f"tensor {show(name)} has 0 dimensions, so it has no rows to choose from")
    chosen = _check_rows(rows, info.shape[0], f"tensor {show(name)}")
    count = len(range(info.shape[0])[chosen]) if isinstance(chosen, slice) else len(chosen)
    return info, chosen, (count, *info.shape[1:])


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
