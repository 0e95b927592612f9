"""encode: tensors to a header and views of their memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ._checks import ITEMSIZE, check_metadata, check_name, show
from ._convert import AnyTensor, to_raw
from ._errors import TooManyTensors
from ._header import write_header
from ._limits import MAX_TENSORS


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
