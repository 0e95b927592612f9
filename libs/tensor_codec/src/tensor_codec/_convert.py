"""Tells NumPy arrays, torch tensors and RawTensors apart without importing either library."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeAlias

from ._errors import UnsupportedTensor
from ._raw import RawTensor

if TYPE_CHECKING:
    import torch

    from ._numpy import Array

AnyTensor: TypeAlias = "Array | torch.Tensor | RawTensor"


def to_raw(value: object, what: str) -> RawTensor:
    """The value as a RawTensor, without a copy where it is contiguous on the CPU; else raises
    UnsupportedTensor."""
    if isinstance(value, RawTensor):
        return value
    # A value of a library that was never imported cannot exist, so there is nothing to import in
    # order to ask; nor one of a library that another thread is importing just now and that has no
    # such class yet.
    tensor = getattr(sys.modules.get("torch"), "Tensor", None)
    if tensor is not None and isinstance(value, tensor):
        from ._torch import from_torch

        return from_torch(value, what)
    array = getattr(sys.modules.get("numpy"), "ndarray", None)
    if array is not None and isinstance(value, array):
        from ._numpy import from_numpy

        return from_numpy(value, what)
    raise UnsupportedTensor(
        f"{what} is {type(value).__name__}; give a NumPy array, a torch tensor or a RawTensor"
    )
