"""What can be wrong with a frame, a tensor or a request for rows: one class each."""

from __future__ import annotations

__all__ = [
    "CodecError", "DuplicateKey", "FrameClosed", "HeaderTooLarge", "HeaderTruncated",
    "InvalidBase64", "InvalidHeaderJSON", "InvalidMetadata", "InvalidName", "InvalidRows",
    "InvalidTensorEntry", "NoNumpyDtype", "OffsetsHole", "OffsetsOverlap", "RankTooHigh",
    "ShapeMismatch", "SizeMismatch", "TooManyTensors", "UnknownTensor", "UnsupportedDtype",
    "UnsupportedTensor",
]  # fmt: skip


class CodecError(ValueError):
    """Base of every refusal of this package."""


# What each refusal is called, and what it means.
# fmt: off
class HeaderTruncated(CodecError):
    """Fewer bytes than the length prefix or the header needs."""
class HeaderTooLarge(CodecError):
    """The JSON header is longer than MAX_HEADER_BYTES."""
class InvalidHeaderJSON(CodecError):
    """The header is not UTF-8, not JSON, or not an object."""
class DuplicateKey(CodecError):
    """A JSON object in the header has one key twice."""
class InvalidMetadata(CodecError):
    """The metadata is not a mapping of text to text."""
class InvalidName(CodecError):
    """A tensor's name is no text, empty, too long, reserved or not UTF-8."""
class InvalidTensorEntry(CodecError):
    """A tensor's description lacks a field, has an unknown one, or one of the wrong type."""
class UnsupportedDtype(CodecError):
    """A dtype outside the table of SPEC.md."""
class NoNumpyDtype(CodecError):
    """NumPy has no bfloat16: read the tensor with torch, or widened to float32."""
class UnsupportedTensor(CodecError):
    """A value that is no dense tensor with data in memory."""
class TooManyTensors(CodecError):
    """More than MAX_TENSORS tensors."""
class RankTooHigh(CodecError):
    """More than MAX_RANK dimensions."""
class ShapeMismatch(CodecError):
    """Shape times dtype is not the number of bytes given."""
class OffsetsOverlap(CodecError):
    """Two tensors share bytes."""
class OffsetsHole(CodecError):
    """Bytes between the tensors belong to none of them."""
class SizeMismatch(CodecError):
    """The tensors do not end exactly where the data ends."""
class InvalidBase64(CodecError):
    """The data of a JSON tensor is not strict base64."""
class UnknownTensor(CodecError):
    """The frame has no tensor of that name."""
class InvalidRows(CodecError):
    """Rows that the tensor does not have, or that cannot be selected."""
class FrameClosed(CodecError):
    """A frame was read after close()."""
# fmt: on
