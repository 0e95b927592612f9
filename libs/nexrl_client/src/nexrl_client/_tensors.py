"""Tensors of the caller's kind: torch where it is installed, NumPy else. Torch is imported when the first is made."""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 - torch imports it: too late for its lock where a fork waits for that
import os
import sys
import threading
from typing import Any

import numpy as np
import tensor_codec
import tensor_codec._numpy  # now, and not by the first call, which a fork may interrupt
from numpy.typing import NDArray
from tensor_codec import Frame, JSONTensor


def tensor_to_data(tensor: Any) -> JSONTensor:
    """A torch or NumPy tensor as JSON: {"data", "shape", "dtype", "encoding": "base64"}. Raises CodecError."""
    return tensor_codec.to_json(tensor)


def data_to_tensor(data: object) -> Any:
    """The inverse of tensor_to_data: a writable CPU tensor, of torch where that is installed, else of NumPy.

    bfloat16 becomes float32 in NumPy. Raises tensor_codec.CodecError for what is no such JSON.
    """
    raw = tensor_codec.from_json(data)
    return raw.torch() if has_torch() else raw.numpy(widen=True).copy()


def frame_tensor(frame: Frame, name: str) -> Any:
    """A tensor of a frame, viewing its memory."""
    return frame.torch(name) if has_torch() else frame.numpy(name, widen=True)


def own_kind(array: NDArray[Any]) -> Any:
    """The array as a tensor of torch, sharing its memory, where that is installed."""
    if not has_torch():
        return array
    import torch

    return torch.from_numpy(array)


def is_tensor(value: object) -> bool:
    """Whether the value is a NumPy array or a torch tensor."""
    return isinstance(value, np.ndarray) or is_torch(value)


def is_torch(value: Any) -> bool:
    """Whether the value is a torch tensor."""
    # A tensor cannot exist before torch was imported; another thread may be importing it just now.
    kind: Any = getattr(sys.modules.get("torch"), "Tensor", None)
    return kind is not None and isinstance(value, kind)


def has_torch() -> bool:
    """Whether results are torch tensors; imports torch, and what of the codec needs it."""
    try:
        with _importing:
            import tensor_codec._torch  # noqa: F401
    except ImportError:
        return False
    return True


def ready() -> None:
    """Import what tensors of a torch that the caller has imported need."""
    if "torch" in sys.modules:
        has_torch()


_importing = threading.RLock()
# A fork waits for an import that another thread is in: its child would wait for the end of that for ever.
os.register_at_fork(before=_importing.acquire, after_in_parent=_importing.release, after_in_child=_importing.release)
