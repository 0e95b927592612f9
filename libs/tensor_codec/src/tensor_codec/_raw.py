"""RawTensor: a tensor as dtype code, shape and bytes; what becomes one, and its form in JSON.

Nothing here needs NumPy or torch until a tensor of theirs is given or asked for.
"""

from __future__ import annotations

import base64
import binascii
import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypedDict

from ._checks import CODES, ITEMSIZE, LONG_NAMES, check_dtype, check_nbytes, check_shape, show
from ._errors import (
    InvalidBase64,
    InvalidTensorEntry,
    ShapeMismatch,
    UnsupportedDtype,
    UnsupportedTensor,
)

if TYPE_CHECKING:
    import torch

    from ._convert import Array

_STEP = 256 * 1024
"""Characters that are decoded at a time, a multiple of four: the interpreter does nothing else
meanwhile."""
_FIELDS = {"data", "shape", "dtype", "encoding"}


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor's little-endian, C-ordered bytes with its safetensors dtype code, such as "BF16".

    Raises UnsupportedDtype, RankTooHigh, InvalidTensorEntry or ShapeMismatch when the three do not
    fit together.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview

    def __post_init__(self) -> None:
        check_dtype(self.dtype, "the raw tensor")
        object.__setattr__(self, "shape", check_shape(self.shape, "the raw tensor"))
        view = memoryview(self.data)
        if not view.c_contiguous:
            raise UnsupportedTensor(
                "the raw tensor's data is not contiguous; give contiguous bytes"
            )
        check_nbytes(self.dtype, self.shape, view.nbytes, "the raw tensor")

    def numpy(self, *, widen: bool = False) -> Array:
        """A view of the data, read-only over bytes. BF16 raises NoNumpyDtype, or becomes float32
        with widen=True."""
        from ._convert import byte_rows, to_numpy

        return to_numpy(
            byte_rows(self.data, self.shape), self.dtype, self.shape, "the raw tensor", widen=widen
        )

    def torch(self) -> torch.Tensor:
        """A CPU tensor over writable data; over read-only data (bytes) a copy, as torch knows no
        read-only tensors."""
        from ._convert import byte_rows, to_torch

        return to_torch(byte_rows(self.data, self.shape), self.dtype, self.shape)


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
        from ._convert import from_torch

        return RawTensor(*from_torch(value, what))
    array = getattr(sys.modules.get("numpy"), "ndarray", None)
    if array is not None and isinstance(value, array):
        from ._convert import from_numpy

        return RawTensor(*from_numpy(value, what))
    raise UnsupportedTensor(
        f"{what} is {type(value).__name__}; give a NumPy array, a torch tensor or a RawTensor"
    )


class JSONTensor(TypedDict):
    """A tensor in JSON; dtype is a long name such as "int64" or "bfloat16", data the base64 of its
    bytes."""

    data: str
    shape: list[int]
    dtype: str
    encoding: str


def to_json(tensor: AnyTensor) -> JSONTensor:
    """The tensor as a JSON object. Raises UnsupportedDtype, UnsupportedTensor or RankTooHigh."""
    raw = to_raw(tensor, "the tensor")
    return {
        "data": base64.b64encode(raw.data).decode(),
        "shape": list(raw.shape),
        "dtype": LONG_NAMES[raw.dtype],
        "encoding": "base64",
    }


def from_json(obj: object) -> RawTensor:
    """Check and decode a JSON tensor; "torch.int64" is accepted for "int64".

    Raises InvalidTensorEntry, UnsupportedDtype, RankTooHigh, ShapeMismatch (before decoding) or
    InvalidBase64.
    """
    if not isinstance(obj, dict) or obj.keys() != _FIELDS:
        got = [str(key) for key in obj] if isinstance(obj, dict) else obj
        raise InvalidTensorEntry(
            f"a JSON tensor must have exactly the fields {sorted(_FIELDS)}, not {show(got)}"
        )
    if obj["encoding"] != "base64":
        raise InvalidTensorEntry(
            f'a JSON tensor\'s encoding must be "base64", not {show(obj["encoding"])}'
        )
    code = CODES.get(obj["dtype"].removeprefix("torch.")) if isinstance(obj["dtype"], str) else None
    if code is None:
        raise UnsupportedDtype(
            f"a JSON tensor has dtype {show(obj['dtype'])}; supported are {', '.join(CODES)}"
        )
    if not isinstance(obj["shape"], list):
        raise InvalidTensorEntry(
            f"a JSON tensor has shape {show(obj['shape'])}; it must be a list of integers"
        )
    shape = check_shape(obj["shape"], "a JSON tensor")
    return RawTensor(code, shape, _decode(obj["data"], ITEMSIZE[code] * math.prod(shape), shape))


def _decode(text: object, nbytes: int, shape: tuple[int, ...]) -> bytearray:
    if not isinstance(text, str):
        raise InvalidBase64(f"a JSON tensor's data must be base64 text, not {type(text).__name__}")
    if len(text) > (nbytes + 2) // 3 * 4:  # cheap, and before the memory for it is taken
        raise ShapeMismatch(
            f"a JSON tensor of shape {list(shape)} has {nbytes} bytes; its data, {len(text)} "
            "characters, is longer"
        )
    try:
        data = bytearray()
        for at in range(0, len(text), _STEP):
            if len(data) * 4 != at * 3:
                raise ValueError("padding in its middle")
            data += base64.b64decode(text[at : at + _STEP], validate=True)
        return data
    except (binascii.Error, ValueError) as error:
        raise InvalidBase64(
            f"a JSON tensor's data is not strict base64: {show(str(error))}"
        ) from None
