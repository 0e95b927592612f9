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

from ._convert import AnyTensor
from ._encode import Encoded, encode
from ._errors import (
    CodecError,
    DuplicateKey,
    FrameClosed,
    HeaderTooLarge,
    HeaderTruncated,
    InvalidBase64,
    InvalidHeaderJSON,
    InvalidMetadata,
    InvalidName,
    InvalidRows,
    InvalidTensorEntry,
    NoNumpyDtype,
    OffsetsHole,
    OffsetsOverlap,
    RankTooHigh,
    ShapeMismatch,
    SizeMismatch,
    TooManyTensors,
    UnknownTensor,
    UnsupportedDtype,
    UnsupportedTensor,
)
from ._frame import Frame, Rows, map_file, open_frame, wrap
from ._header import Header, TensorInfo, header_length, parse_header
from ._json import JSONTensor, from_json, to_json
from ._limits import (
    ALIGNMENT,
    MAX_HEADER_BYTES,
    MAX_LISTS,
    MAX_NAME_LENGTH,
    MAX_RANK,
    MAX_SIZE,
    MAX_TENSORS,
    PREFIX_BYTES,
)
from ._raw import RawTensor

__all__ = [
    "ALIGNMENT",
    "MAX_HEADER_BYTES",
    "MAX_LISTS",
    "MAX_NAME_LENGTH",
    "MAX_RANK",
    "MAX_SIZE",
    "MAX_TENSORS",
    "PREFIX_BYTES",
    "AnyTensor",
    "CodecError",
    "DuplicateKey",
    "Encoded",
    "Frame",
    "FrameClosed",
    "Header",
    "HeaderTooLarge",
    "HeaderTruncated",
    "InvalidBase64",
    "InvalidHeaderJSON",
    "InvalidMetadata",
    "InvalidName",
    "InvalidRows",
    "InvalidTensorEntry",
    "JSONTensor",
    "NoNumpyDtype",
    "OffsetsHole",
    "OffsetsOverlap",
    "RankTooHigh",
    "RawTensor",
    "Rows",
    "ShapeMismatch",
    "SizeMismatch",
    "TensorInfo",
    "TooManyTensors",
    "UnknownTensor",
    "UnsupportedDtype",
    "UnsupportedTensor",
    "encode",
    "from_json",
    "header_length",
    "map_file",
    "open_frame",
    "parse_header",
    "to_json",
    "wrap",
]
