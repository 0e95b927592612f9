"""Torch and NumPy tensors to and from safetensors' layout, without copies.

SPEC.md describes the bytes.

    encoded = encode({"input_ids": ids}, {"step": "3"})   # header and views, to stream or join
    with open_frame(path) as frame:                       # or wrap(buffer)
        mine = frame.torch("input_ids", slice(0, 64))     # maps these rows only

Importing this package imports neither torch nor NumPy. Errors:

ValueError
└── CodecError
    ├── HeaderTruncated, HeaderTooLarge, InvalidHeaderJSON, DuplicateKey  the header as such
    ├── InvalidMetadata, InvalidName, InvalidTensorEntry                  what it says
    ├── UnsupportedDtype, NoNumpyDtype, UnsupportedTensor                 what cannot be held
    ├── TooManyTensors, RankTooHigh                                       limits
    ├── ShapeMismatch, OffsetsOverlap, OffsetsHole, SizeMismatch          sizes that do not fit
    ├── InvalidBase64                                                     the JSON form
    └── UnknownTensor, InvalidRows, FrameClosed                           reading
"""

from . import _errors
from ._checks import (
    ALIGNMENT,
    MAX_HEADER_BYTES,
    MAX_LISTS,
    MAX_NAME_LENGTH,
    MAX_RANK,
    MAX_SIZE,
    MAX_TENSORS,
    PREFIX_BYTES,
)
from ._errors import *  # noqa: F403 - every error, by its __all__
from ._frame import Encoded, Frame, Rows, encode, map_file, open_frame, row_spans, wrap
from ._header import Header, TensorInfo, header_length, parse_header
from ._raw import AnyTensor, JSONTensor, RawTensor, from_json, to_json

__all__ = [
    "ALIGNMENT", "MAX_HEADER_BYTES", "MAX_LISTS", "MAX_NAME_LENGTH", "MAX_RANK", "MAX_SIZE",
    "MAX_TENSORS", "PREFIX_BYTES", "AnyTensor", "Encoded", "Frame", "Header", "JSONTensor",
    "RawTensor", "Rows", "TensorInfo", "encode", "from_json", "header_length", "map_file",
    "open_frame", "parse_header", "row_spans", "to_json", "wrap",
]  # fmt: skip
__all__ += _errors.__all__
