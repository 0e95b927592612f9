"""The limits, the dtype table and the checks that writing and reading share.

Sizes are Python ints: nothing overflows. What is above a limit is refused when written and when
read.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence

from ._errors import (
    InvalidMetadata,
    InvalidName,
    InvalidTensorEntry,
    RankTooHigh,
    ShapeMismatch,
    UnsupportedDtype,
)

PREFIX_BYTES = 8
"""Length of the little-endian header length that starts a frame."""

ALIGNMENT = 64
"""Written headers (prefix included) are padded to a multiple of this, so that the data starts on a
cache line."""

MAX_HEADER_BYTES = 1024 * 1024
"""Length of the JSON header, padding included."""

MAX_TENSORS = 512
"""Tensors in one frame."""

MAX_LISTS = 16_384
"""Brackets and braces in the JSON header, those in the texts of its metadata among them: time to
read, not only bytes."""

MAX_RANK = 8
"""Dimensions of one tensor."""

MAX_NAME_LENGTH = 256
"""Characters of a tensor's name."""

MAX_SIZE = 2**53 - 1
"""Any dimension, number of elements or offset: the integers that every JSON reader keeps exact."""

METADATA_KEY = "__metadata__"

ITEMSIZE = {
    "F64": 8, "I64": 8, "U64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
    "BOOL": 1, "I8": 1, "U8": 1,
}  # fmt: skip
"""Bytes of one element, by safetensors dtype code."""

LONG_NAMES = {
    "F64": "float64", "I64": "int64", "U64": "uint64",
    "F32": "float32", "I32": "int32", "U32": "uint32",
    "BF16": "bfloat16", "F16": "float16", "I16": "int16", "U16": "uint16",
    "BOOL": "bool", "I8": "int8", "U8": "uint8",
}  # fmt: skip
"""NumPy's and torch's name of each dtype code; the name in JSON tensors."""

CODES = {long_name: code for code, long_name in LONG_NAMES.items()}
"""Dtype code by long name."""


def show(value: object) -> str:
    """A short, printable ASCII form of any value, for messages."""
    if isinstance(value, int) and value.bit_length() > 128:
        # printing it may be refused by Python itself
        return f"an integer of {value.bit_length()} bits"
    text = repr(value) if isinstance(value, str) and len(value) <= 80 else reprlib.repr(value)
    return text.encode("ascii", "backslashreplace").decode()


def is_utf8(text: str) -> bool:
    """Whether the text can be written as UTF-8, which lone surrogates cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_name(name: object) -> str:
    """Return the tensor name, or raise InvalidName."""
    if not isinstance(name, str):
        raise InvalidName(f"a tensor's name must be text, not {type(name).__name__}")
    if not 1 <= len(name) <= MAX_NAME_LENGTH:
        raise InvalidName(
            f"tensor name {show(name)} has {len(name)} characters; allowed are 1 to "
            f"{MAX_NAME_LENGTH}"
        )
    if name == METADATA_KEY:
        raise InvalidName(f"the name {METADATA_KEY} is reserved for metadata")
    if not is_utf8(name):
        raise InvalidName(f"tensor name {show(name)} cannot be written as UTF-8")
    return name


def check_metadata(metadata: object) -> dict[str, str]:
    """Return the metadata as a dict of text to text, or raise InvalidMetadata."""
    if not isinstance(metadata, Mapping):
        raise InvalidMetadata(f"metadata must map text to text, not be {type(metadata).__name__}")
    for key, value in metadata.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise InvalidMetadata(
                f"metadata must map text to text; {show(key)} maps to {show(value)}"
            )
        if not (is_utf8(key) and is_utf8(value)):
            raise InvalidMetadata(f"metadata {show(key)} cannot be written as UTF-8")
    return dict(metadata)


def check_dtype(dtype: object, what: str) -> str:
    """Return the dtype code if it is in the table, or raise UnsupportedDtype."""
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise UnsupportedDtype(
            f"{what} has dtype {show(dtype)}; supported are {', '.join(ITEMSIZE)}"
        )
    return dtype


def check_shape(shape: Sequence[object], what: str) -> tuple[int, ...]:
    """Return the shape as a tuple of ints from 0 to MAX_SIZE, or raise RankTooHigh or
    InvalidTensorEntry."""
    if len(shape) > MAX_RANK:
        raise RankTooHigh(f"{what} has {len(shape)} dimensions; the limit is {MAX_RANK}")
    dims: list[int] = []
    for dim in shape:
        if type(dim) is not int or not 0 <= dim <= MAX_SIZE:  # bool is an int, and no dimension
            raise InvalidTensorEntry(
                f"{what} has dimension {show(dim)}; each must be an integer from 0 to {MAX_SIZE}"
            )
        dims.append(dim)
    # Zeros are left out: an empty tensor's strides count too.
    if math.prod(dim for dim in dims if dim) > MAX_SIZE:
        raise InvalidTensorEntry(f"{what} has shape {dims}, beyond {MAX_SIZE} elements")
    return tuple(dims)


def check_nbytes(dtype: str, shape: tuple[int, ...], nbytes: int, what: str) -> None:
    """Raise ShapeMismatch unless shape times dtype is nbytes."""
    needed = ITEMSIZE[dtype] * math.prod(shape)
    if needed != nbytes:
        raise ShapeMismatch(
            f"{what} of dtype {dtype} and shape {list(shape)} needs {needed} bytes and has {nbytes}"
        )
