"""Arithmetic in NumPy on tensors of either kind, given back in the caller's kind; torch is never imported here."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._tensors import is_torch
from .errors import InvalidBatch


def to_numpy(value: Any) -> NDArray[Any]:
    """A torch tensor (from any device), an array or nested lists as an array; floats become float64."""
    if is_torch(value):
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()
    array = np.asarray(value)
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def restore(array: NDArray[Any], *given: Any) -> Any:
    """The array in the kind of what was given: torch, on its device, where any of that is torch, else NumPy.

    Floats take the dtype of the first floating tensor of that kind, else float32; integers and bools stay as they are.
    """
    torch_tensors = [value for value in given if is_torch(value)]
    if not torch_tensors:
        if array.dtype.kind != "f":
            return array
        floats = [value.dtype for value in given if isinstance(value, np.ndarray) and value.dtype.kind == "f"]
        return array.astype(floats[0] if floats else np.float32)
    torch: Any = sys.modules["torch"]
    tensor = torch.from_numpy(array).to(torch_tensors[0].device)
    if array.dtype.kind != "f":
        return tensor
    floats = [value.dtype for value in torch_tensors if value.is_floating_point()]
    return tensor.to(floats[0] if floats else torch.float32)


def append_zero_rows(tensor: Any, count: int) -> Any:
    """A copy of the tensor with count rows of zeros after its own."""
    if is_torch(tensor):
        torch: Any = sys.modules["torch"]
        return torch.cat([tensor, tensor.new_zeros((count, *tensor.shape[1:]))])
    return np.concatenate([tensor, np.zeros((count, *tensor.shape[1:]), tensor.dtype)])


def check_shapes(arrays: Mapping[str, NDArray[Any]], dimensions: int) -> None:
    """Refuse arrays that are not all of one shape with so many dimensions; raises InvalidBatch with their names."""
    if len({array.shape for array in arrays.values()}) != 1 or next(iter(arrays.values())).ndim != dimensions:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        expected = ("[B]", "[B, R]")[dimensions - 1]
        raise InvalidBatch(f"the shapes are {shapes}; {'all' if len(arrays) > 1 else 'it'} must be {expected}")
