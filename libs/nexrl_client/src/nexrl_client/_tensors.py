"""Tensors of torch or NumPy, in and out. Arithmetic is NumPy's; torch is imported late."""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 - torch imports it, too late for a waiting fork
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import numpy as np
import tensor_codec
import tensor_codec._convert  # now, and not by the first call, which a fork may interrupt
from numpy.typing import NDArray
from tensor_codec import AnyTensor, Frame, JSONTensor

from .errors import InvalidBatch

if TYPE_CHECKING:
    import torch

TensorLike: TypeAlias = "NDArray[Any] | torch.Tensor | Sequence[Any]"
"""A torch tensor, a NumPy array, or nested lists of numbers."""
Tensor: TypeAlias = Any
"""A torch tensor or a NumPy array, whichever the caller has."""
_HIDES = "hides some of its values; fill them, and send a mask"


def tensor_to_data(tensor: AnyTensor) -> JSONTensor:
    """A torch or NumPy tensor as JSON: {"data", "shape", "dtype", "encoding": "base64"}. Raises
    CodecError."""
    return tensor_codec.to_json(tensor)


def data_to_tensor(data: object) -> Tensor:
    """The inverse of tensor_to_data: a writable CPU tensor, of torch where that is installed, else
    of NumPy.

    bfloat16 becomes float32 in NumPy. Raises tensor_codec.CodecError for what is no such JSON.
    """
    raw = tensor_codec.from_json(data)
    return raw.torch() if has_torch() else raw.numpy(widen=True).copy()


def frame_tensor(frame: Frame, name: str) -> Tensor:
    """A tensor of a frame, viewing its memory."""
    return frame.torch(name) if has_torch() else frame.numpy(name, widen=True)


def own_kind(array: NDArray[Any]) -> Tensor:
    """The array as a tensor of torch, sharing its memory, where that is installed."""
    if not has_torch():
        return array
    import torch

    return torch.from_numpy(array)


def is_tensor(value: object) -> TypeGuard[Tensor]:
    """Whether the value is a NumPy array or a torch tensor."""
    return isinstance(value, np.ndarray) or is_torch(value)


def is_torch(value: object) -> TypeGuard[torch.Tensor]:
    """Whether the value is a torch tensor."""
    # A tensor cannot exist before torch was imported; another thread may be importing it just now.
    kind: Any = getattr(sys.modules.get("torch"), "Tensor", None)
    return kind is not None and isinstance(value, kind)


def has_torch() -> bool:
    """Whether results are torch tensors; imports torch."""
    try:
        with _importing:
            import torch  # noqa: F401
    except ImportError:
        return False
    return True


def ready() -> None:
    """Import what tensors of a torch that the caller has imported need."""
    if "torch" in sys.modules:
        has_torch()


_importing = threading.RLock()
# A fork waits for an import that another thread is in: its child would wait for the end of that for
# ever.
os.register_at_fork(
    before=_importing.acquire, after_in_parent=_importing.release, after_in_child=_importing.release
)


def to_numpy(value: TensorLike | float) -> NDArray[Any]:
    """A torch tensor (from any device), an array or nested lists as an array; floats become
    float64.

    Raises InvalidBatch for a masked array that hides values and for a nested tensor.
    """
    if isinstance(value, list | tuple):
        value = [to_numpy(item) if is_tensor(item) else item for item in value]
    if np.ma.is_masked(value):
        raise InvalidBatch(f"an array is masked and {_HIDES}")
    if is_torch(value):
        if value.is_nested:
            raise InvalidBatch("a tensor is nested; pad its rows to one length (to_padded_tensor)")
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()
    array = np.asarray(value)
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def taken(name: str, value: Any) -> Tensor:
    """The value as a dense tensor with data: lists of equal lengths become an array.

    Raises InvalidBatch naming the tensor.
    """
    if isinstance(value, list | tuple):
        return _from_rows(name, value)
    reason = None
    if not is_tensor(value):
        kind = type(value).__name__
        reason = f"is {kind}; give a torch tensor, a NumPy array or lists of numbers"
    elif isinstance(value, np.ndarray):
        if value.dtype == object:
            reason = "is a NumPy array of objects; pad its rows to one length, and give numbers"
        elif np.ma.is_masked(value):
            reason = f"is a masked array that {_HIDES}"
    elif value.is_nested:
        reason = "is a nested tensor; pad its rows to one length (to_padded_tensor), and send masks"
    elif value.layout is not sys.modules["torch"].strided or value.is_meta:
        kind = f"layout {value.layout}, device {value.device}"
        reason = f"is no dense tensor with data ({kind}): use full_tensor() or to_dense()"
    if reason is not None:
        raise _refused(name, reason)
    return value


def _from_rows(name: str, rows: Sequence[Any]) -> NDArray[Any]:
    lengths = [_length(name, row) for row in rows]
    for number, length in enumerate(lengths):
        if length != lengths[0]:
            found = "is a number" if length is None else f"has {length} values"
            where = f"row {number} {found}, row 0 {lengths[0]}"
            raise _refused(name, f"has rows of several lengths: {where}; pad them")
    try:
        array = np.asarray([_inner(name, row) for row in rows])
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        said = str(error).splitlines()[0]
        raise _refused(name, f"cannot be made of these lists: {said}") from None
    if array.dtype.kind not in "biuf":
        raise _refused(name, f"holds what is no number ({array.dtype}); give lists of numbers")
    return array


def _length(name: str, row: Any) -> int | None:
    if is_tensor(row):
        return len(row) if taken(name, row).ndim else None
    return len(row) if hasattr(row, "__len__") else None


def _inner(name: str, row: Any) -> Any:
    if is_tensor(row):
        return to_numpy(taken(name, row))
    return [_inner(name, item) for item in row] if isinstance(row, list | tuple) else row


def _refused(name: str, reason: str) -> InvalidBatch:
    return InvalidBatch(f"tensor {name!r} {reason}", details={"tensor": name})


def restore(array: NDArray[Any], *given: object) -> Tensor:
    """The array in the kind of what was given: torch, on its device, where any of that is torch,
    else NumPy.

    Floats take the dtype of the first floating tensor of that kind, else float32; integers and
    bools stay as they are.
    """
    torch_tensors = [value for value in given if is_torch(value)]
    if not torch_tensors:
        if array.dtype.kind != "f":
            return array
        arrays = [value for value in given if isinstance(value, np.ndarray)]
        floats = [value.dtype for value in arrays if value.dtype.kind == "f"]
        return array.astype(floats[0] if floats else np.float32)
    torch: Any = sys.modules["torch"]
    tensor = torch.from_numpy(array).to(torch_tensors[0].device)
    if array.dtype.kind != "f":
        return tensor
    floats = [value.dtype for value in torch_tensors if value.is_floating_point()]
    return tensor.to(floats[0] if floats else torch.float32)


def append_zero_rows(tensor: Tensor, count: int) -> Tensor:
    """A copy of the tensor with count rows of zeros after its own."""
    if is_torch(tensor):
        torch: Any = sys.modules["torch"]
        return torch.cat([tensor, tensor.new_zeros((count, *tensor.shape[1:]))])
    return np.concatenate([tensor, np.zeros((count, *tensor.shape[1:]), tensor.dtype)])


def check_shapes(arrays: Mapping[str, NDArray[Any]], dimensions: int) -> None:
    """Refuse arrays that are not all of one shape with so many dimensions; raises InvalidBatch with
    their names."""
    found = {array.shape for array in arrays.values()}
    if len(found) != 1 or len(found.pop()) != dimensions:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        expected = ("[B]", "[B, R]")[dimensions - 1]
        raise InvalidBatch(
            f"the shapes are {shapes}; {'all' if len(arrays) > 1 else 'it'} must be {expected}"
        )
