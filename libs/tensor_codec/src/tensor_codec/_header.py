"""The header of a frame: its length, its parsing and its writing. Needs neither NumPy nor torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ._checks import (
    ALIGNMENT,
    MAX_HEADER_BYTES,
    MAX_LISTS,
    MAX_SIZE,
    MAX_TENSORS,
    METADATA_KEY,
    PREFIX_BYTES,
    check_dtype,
    check_metadata,
    check_name,
    check_nbytes,
    check_shape,
    show,
)
from ._errors import (
    DuplicateKey,
    HeaderTooLarge,
    HeaderTruncated,
    InvalidHeaderJSON,
    InvalidTensorEntry,
    OffsetsHole,
    OffsetsOverlap,
    SizeMismatch,
    TooManyTensors,
)

_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a frame; its bytes are data[start:end], counted from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed and checked header. data_start and total_size are bytes from the start of the
    frame."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    total_size: int

    def with_metadata(self, metadata: Mapping[str, str]) -> bytes:
        """Prefix, JSON and padding of the same tensors with other metadata. Raises HeaderTooLarge
        and InvalidMetadata."""
        entries = sorted(self.tensors.items(), key=lambda entry: (entry[1].start, entry[1].end))
        return write_header(
            [(name, info.dtype, info.shape, info.nbytes) for name, info in entries],
            check_metadata(metadata),
        )


def header_length(first8: bytes | bytearray | memoryview) -> int:
    """Bytes of prefix and JSON together, from a frame's first eight bytes.

    Raises HeaderTruncated for fewer than eight, HeaderTooLarge above MAX_HEADER_BYTES,
    InvalidHeaderJSON below 2.
    """
    if len(first8) < PREFIX_BYTES:
        raise HeaderTruncated(
            f"a frame starts with {PREFIX_BYTES} bytes of header length; there are {len(first8)}"
        )
    length = int.from_bytes(first8[:PREFIX_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise HeaderTooLarge(f"the header claims {length} bytes; the limit is {MAX_HEADER_BYTES}")
    if length < 2:
        raise InvalidHeaderJSON(
            f"the header claims {length} bytes; the shortest JSON object, {{}}, has 2"
        )
    return PREFIX_BYTES + length


def parse_header(data: bytes | bytearray | memoryview, total_size: int | None = None) -> Header:
    """Check and parse the header of a frame; data holds at least prefix and JSON, and may hold the
    whole frame.

    total_size is the frame's length in bytes, which the tensors must fill exactly; None where it is
    not known yet (a stream), and then Header.total_size says how long the frame has to become.
    Raises CodecError's subclasses.
    """
    view = memoryview(data).cast("B")
    data_start = header_length(view[:PREFIX_BYTES])
    if len(view) < data_start:
        raise HeaderTruncated(f"the header needs {data_start} bytes; there are {len(view)}")
    entries = _load_json(bytes(view[PREFIX_BYTES:data_start]))
    metadata = check_metadata(entries.pop(METADATA_KEY, {}))
    if len(entries) > MAX_TENSORS:
        raise TooManyTensors(f"the frame has {len(entries)} tensors; the limit is {MAX_TENSORS}")
    tensors = {check_name(name): _parse_entry(name, entry) for name, entry in entries.items()}
    implied = data_start + _check_cover(tensors)
    if total_size is not None and total_size != implied:
        raise SizeMismatch(f"header and tensors take {implied} bytes; the frame has {total_size}")
    return Header(tensors, metadata, data_start, implied)


def write_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> bytes:
    """Prefix, JSON and padding for tensors given as (name, dtype, shape, nbytes) in the order of
    their data."""
    entries: dict[str, Any] = {METADATA_KEY: dict(sorted(metadata.items()))} if metadata else {}
    start = 0
    for name, dtype, shape, nbytes in tensors:
        entries[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [start, start + nbytes],
        }
        start += nbytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    _check_lists(text)
    length = len(text) + -(PREFIX_BYTES + len(text)) % ALIGNMENT
    if length > MAX_HEADER_BYTES:
        raise HeaderTooLarge(
            f"the header would have {length} bytes; the limit is {MAX_HEADER_BYTES}: shorten "
            "metadata"
        )
    return length.to_bytes(PREFIX_BYTES, "little") + text.ljust(length)


def _check_lists(raw: bytes) -> None:
    lists = raw.count(b"[") + raw.count(b"{")
    if lists > MAX_LISTS:
        raise HeaderTooLarge(f"the header has {lists} lists and objects; the limit is {MAX_LISTS}")


def _load_json(raw: bytes) -> dict[str, Any]:
    if raw[:1] != b"{":
        raise InvalidHeaderJSON(f"the header must start with '{{', not {show(raw[:1])}")
    _check_lists(raw)
    try:
        loaded = json.loads(
            raw.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except (DuplicateKey, InvalidHeaderJSON):
        raise
    except (ValueError, RecursionError) as error:
        # Not UTF-8, not JSON, an endless number, endless nesting.
        raise InvalidHeaderJSON(f"the header is not UTF-8 JSON: {show(str(error))}") from None
    assert isinstance(loaded, dict)  # it starts with a brace
    return loaded


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise DuplicateKey(f"the header has the key {show(key)} twice")
        result[key] = value
    return result


def _refuse_constant(text: str) -> NoReturn:
    raise InvalidHeaderJSON(f"the header holds {text}, which is not JSON")


def _parse_entry(name: str, entry: object) -> TensorInfo:
    what = f"tensor {show(name)}"
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        got = sorted(entry) if isinstance(entry, dict) else entry
        raise InvalidTensorEntry(
            f"{what} must have exactly the fields {sorted(_FIELDS)}, not {show(got)}"
        )
    dtype, shape, offsets = check_dtype(entry["dtype"], what), entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list):
        raise InvalidTensorEntry(f"{what} has shape {show(shape)}; it must be a list of integers")
    dims = check_shape(shape, what)
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or any(type(offset) is not int for offset in offsets)
    ):
        raise InvalidTensorEntry(
            f"{what} has data_offsets {show(offsets)}; they must be two integers"
        )
    start, end = offsets
    if not 0 <= start <= end <= MAX_SIZE:
        raise InvalidTensorEntry(
            f"{what} has data_offsets {show(offsets)}; they must rise, from 0 to {MAX_SIZE}"
        )
    check_nbytes(dtype, dims, end - start, what)
    return TensorInfo(dtype, dims, start, end)


def _check_cover(tensors: Mapping[str, TensorInfo]) -> int:
    """Bytes of data, after checking that the tensors fill them in some order without overlap or
    hole."""
    covered = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start < covered:
            raise OffsetsOverlap(
                f"tensor {show(name)} starts at {info.start}, inside one that ends at {covered}"
            )
        if info.start > covered:
            raise OffsetsHole(
                f"tensor {show(name)} starts at {info.start}, and the last one ended at {covered}"
            )
        covered = info.end
    return covered
