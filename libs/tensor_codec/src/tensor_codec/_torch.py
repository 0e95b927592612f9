"""Torch tensors to bytes and back: the one module that imports torch, and itself imported only
where one is needed."""

from __future__ import annotations

import torch

from ._checks import CODES, ITEMSIZE, LONG_NAMES, check_shape
from ._errors import UnsupportedDtype, UnsupportedTensor
from ._numpy import Bytes
from ._raw import RawTensor


def from_torch(tensor: torch.Tensor, what: str) -> RawTensor:
    """The tensor as a RawTensor: a view of a contiguous CPU tensor, else a copy of just its own
    elements on the CPU."""
    code = CODES.get(str(tensor.dtype).removeprefix("torch."))
    if code is None:
        raise UnsupportedDtype(f"{what} has dtype {tensor.dtype}; supported are {', '.join(CODES)}")
    own_data = (
        type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    )  # not a wrapper of other tensors
    if not own_data or tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        kind = f"{type(tensor).__name__}, layout {tensor.layout}, device {tensor.device}"
        advice = "use full_tensor(), to_dense() or to_padded_tensor()"
        raise UnsupportedTensor(f"{what} is no dense tensor with data ({kind}): {advice}")
    plain = tensor.detach().as_subclass(torch.Tensor)
    shape = check_shape(tuple(plain.shape), what)
    dense = plain.resolve_neg().contiguous().cpu()
    flat = dense.as_strided(
        (dense.numel(),), (1,)
    )  # reshape(-1) keeps an odd stride where there is at most one element
    return RawTensor(code, shape, flat.view(torch.uint8).numpy().data)


def to_torch(table: Bytes, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Give byte rows their dtype and shape: a view, but a copy of bytes that are read-only or not
    aligned."""
    torch_dtype: torch.dtype = getattr(torch, LONG_NAMES[dtype])
    if table.size == 0:
        return torch.empty(shape, dtype=torch_dtype)
    if not table.flags.writeable or table.ctypes.data % ITEMSIZE[dtype]:
        table = table.copy()
    return torch.from_numpy(table).view(torch_dtype).reshape(shape)
