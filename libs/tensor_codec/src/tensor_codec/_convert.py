"""Arrays and torch tensors to bytes and back. Imports NumPy; torch only where one is needed.

Bytes have the order of C and little-endian elements. A tensor of shape [n, ...] is looked at as a
table [n, bytes of a row] of uint8, so that rows can be chosen before they are read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ._checks import CODES, ITEMSIZE, LONG_NAMES, check_shape, show
from ._errors import NoNumpyDtype, UnsupportedDtype, UnsupportedTensor

if TYPE_CHECKING:
    import torch

Array: TypeAlias = NDArray[Any]
Bytes: TypeAlias = NDArray[np.uint8]
Parts: TypeAlias = tuple[str, tuple[int, ...], memoryview]
"""Dtype code, shape and bytes of a tensor: what a RawTensor is made of."""


def from_numpy(array: Array, what: str) -> Parts:
    """The array's parts: a view if it is C-contiguous and little-endian, else a copy of its own
    elements."""
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
    return code, shape, flat.view(np.uint8).data


def byte_rows(data: bytes | bytearray | memoryview, shape: tuple[int, ...]) -> Bytes:
    """View the bytes of a tensor as [rows, bytes of a row] uint8; a 0-dim tensor is one row.
    Nothing is read."""
    rows = shape[0] if shape else 1
    nbytes = memoryview(data).nbytes
    if nbytes == 0:
        return np.empty((rows, 0), np.uint8)
    return np.frombuffer(data, np.uint8).reshape(rows, nbytes // rows)


def to_numpy(table: Bytes, dtype: str, shape: tuple[int, ...], what: str, *, widen: bool) -> Array:
    """Give byte rows [rows, bytes of a row] their dtype and shape: a view, except that widened BF16
    is a new float32 array."""
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


def from_torch(tensor: torch.Tensor, what: str) -> Parts:
    """The tensor's parts: a view of a contiguous CPU tensor, else a copy of just its own elements
    on the CPU."""
    import torch

    code = CODES.get(str(tensor.dtype).removeprefix("torch."))
    if code is None:
        raise UnsupportedDtype(f"{what} has dtype {tensor.dtype}; supported are {', '.join(CODES)}")
    # Not a wrapper of other tensors.
    own_data = type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    if not own_data or tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        kind = f"{type(tensor).__name__}, layout {tensor.layout}, device {tensor.device}"
        advice = "use full_tensor(), to_dense() or to_padded_tensor()"
        raise UnsupportedTensor(f"{what} is no dense tensor with data ({kind}): {advice}")
    plain = tensor.detach().as_subclass(torch.Tensor)
    shape = check_shape(tuple(plain.shape), what)
    dense = plain.resolve_neg().contiguous().cpu()
    # Not reshape(-1), which keeps an odd stride where there is at most one element.
    flat = dense.as_strided((dense.numel(),), (1,))
    return code, shape, flat.view(torch.uint8).numpy().data


def to_torch(table: Bytes, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Give byte rows [rows, bytes of a row] their dtype and shape: a view, but a copy of bytes that
    are read-only or not aligned."""
    import torch

    torch_dtype: torch.dtype = getattr(torch, LONG_NAMES[dtype])
    if table.size == 0:
        return torch.empty(shape, dtype=torch_dtype)
    if not table.flags.writeable or table.ctypes.data % ITEMSIZE[dtype]:
        table = table.copy()
    return torch.from_numpy(table).view(torch_dtype).reshape(shape)
