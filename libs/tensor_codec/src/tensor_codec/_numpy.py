"""NumPy arrays to bytes and back. Imported only where an array is given or asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._checks import CODES, LONG_NAMES, check_shape, show
from ._errors import NoNumpyDtype, UnsupportedDtype, UnsupportedTensor
from ._raw import RawTensor

Array = NDArray[Any]
Bytes = NDArray[np.uint8]


def from_numpy(array: Array, what: str) -> RawTensor:
    """The array as a RawTensor: a view if it is C-contiguous and little-endian, else a copy of its
    own elements."""
    if isinstance(array, np.ma.MaskedArray) and np.ma.is_masked(array):
        raise UnsupportedTensor(
            f"{what} is a masked array that hides some of its values; fill them, and send a mask"
        )
    code = CODES.get(array.dtype.name)
    if code is None:
        raise UnsupportedDtype(
            f"{what} has NumPy dtype {show(str(array.dtype))}; supported are {', '.join(CODES)}"
        )
    shape = check_shape(array.shape, what)  # before flattening, which turns 0-dim into [1]
    flat = np.ascontiguousarray(np.asarray(array), dtype=array.dtype.newbyteorder("<")).reshape(-1)
    return RawTensor(code, shape, flat.view(np.uint8).data)


def byte_rows(data: bytes | bytearray | memoryview, shape: tuple[int, ...]) -> Bytes:
    """View the bytes of a tensor as [rows, bytes of a row] uint8; a 0-dim tensor is one row.
    Nothing is read."""
    rows = shape[0] if shape else 1
    nbytes = memoryview(data).nbytes
    if nbytes == 0:
        return np.empty((rows, 0), np.uint8)
    return np.frombuffer(data, np.uint8).reshape(rows, nbytes // rows)


def to_numpy(table: Bytes, dtype: str, shape: tuple[int, ...], what: str, *, widen: bool) -> Array:
    """Give byte rows their dtype and shape: a view, except that widened BF16 is a new float32
    array."""
    if dtype == "BF16":
        if not widen:
            raise NoNumpyDtype(
                f"{what} is BF16, which NumPy lacks: use torch(), or widen=True for float32"
            )
        halves = to_numpy(table, "U16", shape, what, widen=False)
        words = np.empty(shape, np.uint32)
        return np.left_shift(halves, 16, out=words, dtype=np.uint32).view(np.float32)
    if table.size == 0:
        return np.empty(shape, LONG_NAMES[dtype])
    return table.view(np.dtype(LONG_NAMES[dtype]).newbyteorder("<")).reshape(shape)
