"""One test per named error, with what its message must name; every check holds for reading and for
writing."""

from __future__ import annotations

import numpy as np
import pytest
import tensor_codec as tc
import torch


def refuse(error: type[tc.CodecError], data: bytes, *words: str) -> None:
    """wrap() raises exactly this error, and its message has the words."""
    with pytest.raises(tc.CodecError) as caught:
        tc.wrap(data)
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)


def test_every_error_is_a_codec_error_and_a_value_error() -> None:
    """One except clause catches all of them."""
    errors = [
        value
        for value in vars(tc).values()
        if isinstance(value, type) and issubclass(value, Exception)
    ]
    assert len(errors) == 21
    assert all(
        issubclass(error, tc.CodecError) and issubclass(error, ValueError) for error in errors
    )


@pytest.mark.parametrize("length", range(8))
def test_header_truncated_prefix(length: int) -> None:
    """Fewer than eight bytes hold no header length."""
    refuse(tc.HeaderTruncated, bytes(length), str(length))
    with pytest.raises(tc.HeaderTruncated):
        tc.header_length(bytes(length))


def test_header_truncated_json(frame_of) -> None:
    """A header longer than the buffer is refused, with both lengths."""
    refuse(tc.HeaderTruncated, frame_of({})[:-1], "10", "9")


def test_header_truncated_file(tmp_path) -> None:
    """An empty file is a truncated frame, not an operating-system error."""
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(tc.HeaderTruncated, match="0 bytes"):
        tc.open_frame(tmp_path / "empty")


@pytest.mark.parametrize("length", [tc.MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_header_too_large(length: int) -> None:
    """A length above the limit is refused from eight bytes alone."""
    with pytest.raises(tc.HeaderTooLarge, match=str(tc.MAX_HEADER_BYTES)):
        tc.header_length(length.to_bytes(8, "little"))


def test_header_at_the_limit() -> None:
    """The limit itself is allowed, read and written."""
    assert tc.header_length(tc.MAX_HEADER_BYTES.to_bytes(8, "little")) == tc.MAX_HEADER_BYTES + 8
    padded = tc.MAX_HEADER_BYTES.to_bytes(8, "little") + b"{}".ljust(tc.MAX_HEADER_BYTES)
    assert tc.wrap(padded).header.tensors == {}


def test_header_too_large_when_written() -> None:
    """encode() makes no header that wrap() would refuse."""
    with pytest.raises(tc.HeaderTooLarge, match=str(tc.MAX_HEADER_BYTES)):
        tc.encode({}, {"k": "v" * tc.MAX_HEADER_BYTES})


def test_a_header_of_many_lists_is_not_read() -> None:
    """What bounds a header's bytes does not bound the time that its JSON takes; refused when
    written, too."""
    text = b'{"a":[' + b"[]," * tc.MAX_LISTS + b"[]]}"
    with pytest.raises(tc.HeaderTooLarge, match=str(tc.MAX_LISTS)):
        tc.parse_header(len(text).to_bytes(8, "little") + text)
    with pytest.raises(tc.HeaderTooLarge, match=str(tc.MAX_LISTS)):
        tc.encode({}, {"k": "[" * tc.MAX_LISTS})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        " {}",
        "{}x",
        '{"a":NaN}',
        '{"a":Infinity}',
        '{"a":' + "[" * 16_000,
        '{"a":' + "9" * 5000 + "}",
    ],
    ids=["empty", "open", "list", "space", "tail", "nan", "infinity", "nested", "endless-number"],
)
def test_invalid_header_json(frame_of, text: str) -> None:
    """What is no JSON object is refused, endless nesting and numbers too."""
    refuse(tc.InvalidHeaderJSON, frame_of(text))


def test_invalid_header_utf8() -> None:
    """Bytes that are not UTF-8 are refused."""
    refuse(tc.InvalidHeaderJSON, b"\x07" + bytes(7) + b'{"\xff":1}', "UTF-8")


@pytest.mark.parametrize(
    "text",
    ['{"a":1,"a":1}', '{"a":{"dtype":"U8","dtype":"U8"}}', '{"__metadata__":{"a":"","a":""}}'],
)
def test_duplicate_key(frame_of, text: str) -> None:
    """A key twice is refused at every level, by name."""
    refuse(tc.DuplicateKey, frame_of(text), "dtype" if "dtype" in text else "'a'")


@pytest.mark.parametrize(
    "metadata", [None, [], "x", {"step": 3}, {"step": None}, {"step": ["3"]}, {"\ud800": "x"}]
)
def test_invalid_metadata(frame_of, metadata: object) -> None:
    """Metadata that is not text to text is refused."""
    refuse(tc.InvalidMetadata, frame_of({"__metadata__": metadata}), "metadata")


@pytest.mark.parametrize("metadata", [{"step": 3}, {3: "step"}, {"x": "\udfff"}, ["x"]])
def test_invalid_metadata_when_written(metadata: object) -> None:
    """encode() refuses the same metadata."""
    with pytest.raises(tc.InvalidMetadata):
        tc.encode({}, metadata)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "n" * (tc.MAX_NAME_LENGTH + 1), "\ud800"])
def test_invalid_name(frame_of, entry, name: str) -> None:
    """Empty, over-long and non-UTF-8 names are refused, read or written."""
    refuse(tc.InvalidName, frame_of({name: entry("U8", [0], 0, 0)}))
    with pytest.raises(tc.InvalidName):
        tc.encode({name: np.zeros(0)})


@pytest.mark.parametrize("name", ["__metadata__", 3, None])
def test_invalid_name_when_written(name: object) -> None:
    """Reserved names and names that are no text are refused."""
    with pytest.raises(tc.InvalidName):
        tc.encode({name: np.zeros(0)})  # type: ignore[dict-item]


SHAPES = [None, 1, "1", {}, [-1], [1.0], [True], ["1"], [None], [2**53], [10**4000]]
OFFSETS = [
    None,
    0,
    [0],
    [0, 1, 2],
    [0.0, 1],
    [False, 1],
    ["0", "1"],
    [-1, 0],
    [1, 0],
    [2**53, 2**53 + 1],
    [0, 10**4000],
]
ENTRIES = [
    *(None, [], {}, {"dtype": "U8", "shape": [0]}),
    {"dtype": "U8", "shape": [0], "data_offsets": [0, 0], "extra": 1},
    {"dtype": "U8", "shape": [2**30, 2**30, 0], "data_offsets": [0, 0]},
    *({"dtype": "U8", "shape": shape, "data_offsets": [0, 1]} for shape in SHAPES),
    *({"dtype": "U8", "shape": [1], "data_offsets": pair} for pair in OFFSETS),
]


@pytest.mark.parametrize("value", ENTRIES, ids=range(len(ENTRIES)))
def test_invalid_tensor_entry(frame_of, value: object) -> None:
    """Missing, unknown and mistyped fields are refused, and the tensor is named."""
    refuse(tc.InvalidTensorEntry, frame_of({"tiny": value}, b"\0"), "'tiny'")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "C64", "f32", "", None, 3, ["F32"]])
def test_unsupported_dtype(frame_of, entry, dtype: object) -> None:
    """A dtype outside the table is refused, by name, with those that are supported."""
    refuse(tc.UnsupportedDtype, frame_of({"t": entry(dtype, [0], 0, 0)}), "'t'", "BF16")


DTYPELESS = [
    *(np.array(["x"]), np.array([None]), np.array([1j]), np.array(["2020"], "M8[D]")),
    *(torch.tensor([1j]), torch.ones(1).to(torch.float8_e5m2)),
]


@pytest.mark.parametrize("value", DTYPELESS, ids=lambda value: str(value.dtype))
def test_unsupported_dtype_when_written(value: object) -> None:
    """encode() and to_json() refuse what the table lacks."""
    with pytest.raises(tc.UnsupportedDtype, match="'t'"):
        tc.encode({"t": value})  # type: ignore[dict-item]
    with pytest.raises(tc.UnsupportedDtype):
        tc.to_json(value)  # type: ignore[arg-type]


def test_no_numpy_dtype() -> None:
    """BF16 as NumPy says what to do instead, and widens only when asked."""
    values = torch.tensor([[1.0, -2.5], [float("inf"), 0.0]], dtype=torch.bfloat16)
    frame = tc.wrap(tc.encode({"half": values, "one": values[0, 1]}).tobytes())
    with pytest.raises(tc.NoNumpyDtype, match=r"'half'.*torch\(\).*widen=True"):
        frame.numpy("half")
    wide = frame.numpy("half", [1, 0], widen=True)
    assert wide.dtype == np.float32 and wide.tolist() == [[float("inf"), 0.0], [1.0, -2.5]]
    one = frame.numpy("one", widen=True)
    assert isinstance(one, np.ndarray) and one.shape == () and one.tolist() == -2.5


@pytest.mark.parametrize(
    "value",
    [
        [1, 2],
        3.0,
        None,
        np.float32(1),
        b"x",
        torch.eye(2).to_sparse(),
        torch.empty(2, device="meta"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_unsupported_tensor(value: object) -> None:
    """What is no dense tensor with data is refused, by name."""
    with pytest.raises(tc.UnsupportedTensor, match="'t'"):
        tc.encode({"t": value})  # type: ignore[dict-item]


def test_unsupported_tensor_raw_data_with_gaps() -> None:
    """Raw data must be contiguous."""
    with pytest.raises(tc.UnsupportedTensor, match="contiguous"):
        tc.RawTensor("U8", (2,), memoryview(b"abcd")[::2])


def test_too_many_tensors(frame_of, entry) -> None:
    """One more than the limit is refused, read or written; the limit itself is not."""
    entries = {f"t{index}": entry("U8", [0], 0, 0) for index in range(tc.MAX_TENSORS)}
    assert len(tc.wrap(frame_of({**entries, "__metadata__": {}})).header.tensors) == tc.MAX_TENSORS
    assert len(tc.encode(dict.fromkeys(entries, np.zeros(0)))) > 0
    entries["more"] = entry("U8", [0], 0, 0)
    refuse(tc.TooManyTensors, frame_of(entries), "513", "512")
    with pytest.raises(tc.TooManyTensors):
        tc.encode(dict.fromkeys(entries, np.zeros(0)))


def test_rank_too_high(frame_of, entry) -> None:
    """Nine dimensions are refused, read or written; eight are not."""
    assert tc.wrap(frame_of({"t": entry("U8", [1] * 8, 0, 1)}, b"\0")).numpy("t").ndim == 8
    refuse(tc.RankTooHigh, frame_of({"t": entry("U8", [1] * 9, 0, 1)}, b"\0"), "'t'", "9", "8")
    for value in (np.zeros([1] * 9), torch.zeros([1] * 9)):
        with pytest.raises(tc.RankTooHigh):
            tc.encode({"t": value})


@pytest.mark.parametrize("shape", [[2], [4], [1, 2], [0], [2**40, 2**10]])
def test_shape_mismatch(frame_of, entry, shape: list[int]) -> None:
    """Shape times dtype must be the bytes; products beyond 64 bits do not wrap round."""
    refuse(
        tc.ShapeMismatch,
        frame_of({"t": entry("I32", shape, 0, 12)}, bytes(12)),
        "'t'",
        "12",
        str(shape),
    )


def test_shape_mismatch_overflow(frame_of, entry) -> None:
    """A product that is 0 modulo 2**64 is no match for 0 bytes."""
    refuse(tc.InvalidTensorEntry, frame_of({"t": entry("U8", [2**32, 2**32], 0, 0)}), "'t'")
    with pytest.raises(tc.ShapeMismatch):
        tc.RawTensor("F32", (3,), b"abcd")


def test_offsets_overlap(frame_of, entry) -> None:
    """Two tensors may not share bytes, nor may one without elements stand inside another."""
    refuse(
        tc.OffsetsOverlap,
        frame_of({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, bytes(6)),
        "'b'",
        "4",
    )
    refuse(
        tc.OffsetsOverlap,
        frame_of({"a": entry("U8", [4], 0, 4), "b": entry("U8", [0], 2, 2)}, bytes(4)),
        "'b'",
    )


def test_offsets_hole(frame_of, entry) -> None:
    """Bytes that belong to no tensor are refused, before and between tensors."""
    refuse(tc.OffsetsHole, frame_of({"a": entry("U8", [4], 1, 5)}, bytes(5)), "'a'", "1")
    refuse(
        tc.OffsetsHole,
        frame_of({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, bytes(3)),
        "'b'",
    )


@pytest.mark.parametrize("size", [0, 3, 5, 100])
def test_size_mismatch(frame_of, entry, tmp_path, size: int) -> None:
    """Data that is truncated or goes on is refused, in a buffer and in a file, with both sizes."""
    data = frame_of({"a": entry("U8", [4], 0, 4)}, bytes(size))
    refuse(tc.SizeMismatch, data, str(len(data)), str(len(data) - size + 4))
    (tmp_path / "frame").write_bytes(data)
    with pytest.raises(tc.SizeMismatch):
        tc.open_frame(tmp_path / "frame")


def test_size_unknown_while_streaming(frame_of, entry) -> None:
    """parse_header without a size needs the header alone and says how long the frame must
    become."""
    whole = frame_of({"a": entry("U8", [4], 0, 4)}, b"abcd")
    header = tc.parse_header(whole[:-4])
    assert header.total_size == len(whole) and header.data_start == len(whole) - 4
    assert (
        header.tensors == {"a": tc.TensorInfo("U8", (4,), 0, 4)} and header.tensors["a"].nbytes == 4
    )
    with pytest.raises(tc.SizeMismatch):
        tc.parse_header(whole[:-4], total_size=len(whole) - 4)


def test_unknown_tensor() -> None:
    """A name that is not there is answered with those that are."""
    frame = tc.wrap(tc.encode({"here": np.zeros(1)}).tobytes())
    with pytest.raises(tc.UnknownTensor, match=r"'gone'.*'here'"):
        frame.numpy("gone")
    with pytest.raises(tc.UnknownTensor):
        frame.torch("gone")


@pytest.mark.parametrize(
    "rows",
    [
        [3],
        [-1],
        [0, 10**5000],
        ["0"],
        [0.0],
        1,
        "01",
        slice(None, None, -1),
        slice(0, 2, 0),
        slice("a", None),
    ],
)
def test_invalid_rows(rows: object) -> None:
    """Rows outside the tensor, and what is no row, are refused, by the tensor's name."""
    frame = tc.wrap(tc.encode({"three": np.zeros((3, 2))}).tobytes())
    with pytest.raises(tc.InvalidRows, match="'three'"):
        frame.numpy("three", rows)  # type: ignore[arg-type]


def test_invalid_rows_of_a_scalar() -> None:
    """A 0-dim tensor has no rows."""
    frame = tc.wrap(tc.encode({"scalar": np.array(1.0)}).tobytes())
    with pytest.raises(tc.InvalidRows, match="0 dimensions"):
        frame.torch("scalar", slice(0, 1))


def test_frame_closed() -> None:
    """A closed frame says so; its header stays readable."""
    with tc.wrap(tc.encode({"a": np.zeros(1)}).tobytes()) as frame:
        pass
    with pytest.raises(tc.FrameClosed, match="'a'"):
        frame.numpy("a")
    assert list(frame.header.tensors) == ["a"]
