"""The base64 JSON form of one tensor, for any HTTP user: {"data", "shape", "dtype", "encoding":
"base64"}."""

from __future__ import annotations

import base64
import binascii
import math
from typing import TypedDict

from ._checks import CODES, ITEMSIZE, LONG_NAMES, check_shape, show
from ._convert import AnyTensor, to_raw
from ._errors import InvalidBase64, InvalidTensorEntry, ShapeMismatch, UnsupportedDtype
from ._raw import RawTensor

_STEP = 256 * 1024
"""Characters that are decoded at a time, a multiple of four: the interpreter does nothing else
meanwhile."""
_FIELDS = {"data", "shape", "dtype", "encoding"}


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
