"""The base64 JSON form."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
import torch
from tensor_codec import (
    CodecError,
    InvalidBase64,
    InvalidTensorEntry,
    NoNumpyDtype,
    RankTooHigh,
    RawTensor,
    ShapeMismatch,
    UnsupportedDtype,
    from_json,
    to_json,
)
from tensor_codec._checks import CODES

GOOD = {
    "data": base64.b64encode(bytes(range(12))).decode(),
    "shape": [3],
    "dtype": "int32",
    "encoding": "base64",
}


def test_golden() -> None:
    """The object for a fixed tensor never changes, from either library or raw."""
    expected = {
        "data": "AQAAAAAAAAACAAAAAAAAAA==",
        "shape": [2, 1],
        "dtype": "int64",
        "encoding": "base64",
    }
    array = np.array([[1], [2]])
    raw = RawTensor("I64", (2, 1), array.tobytes())
    assert to_json(array) == to_json(torch.from_numpy(array)) == to_json(raw) == expected


@pytest.mark.parametrize("dtype", list(CODES))
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3)])
def test_round_trip(dtype: str, shape: tuple[int, ...]) -> None:
    """Every dtype and shape comes back through JSON text, also under torch's spelling of the
    dtype."""
    tensor = torch.arange(int(np.prod(shape))).reshape(shape).to(getattr(torch, dtype))
    obj = json.loads(json.dumps(to_json(tensor)))
    assert obj["dtype"] == dtype
    for spelling in (dtype, f"torch.{dtype}"):
        raw = from_json({**obj, "dtype": spelling})
        assert torch.equal(raw.torch(), tensor) and raw.torch().dtype == tensor.dtype
        if dtype == "bfloat16":
            assert raw.numpy(widen=True).tolist() == tensor.float().tolist()
            with pytest.raises(NoNumpyDtype):
                raw.numpy()
        else:
            np.testing.assert_array_equal(raw.numpy(), tensor.numpy(), strict=True)


def test_view_does_not_drag_its_storage() -> None:
    """A column is encoded alone."""
    assert len(to_json(torch.zeros(4, 1000, dtype=torch.uint8)[:, 1])["data"]) == 8


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"data": "AAA"}, InvalidBase64),
        ({"data": "AAAAAAAAAAAAAAA\n"}, InvalidBase64),
        ({"data": "AAAA AAAAAAAAAAA"}, InvalidBase64),
        ({"data": "AA-_AAAAAAAAAAAA"}, InvalidBase64),
        ({"data": "AAAA====AAAAAAAA"}, InvalidBase64),
        ({"data": "é" * 16}, InvalidBase64),
        ({"data": None}, InvalidBase64),
        ({"data": [1, 2]}, InvalidBase64),
        ({"data": GOOD["data"][:-4]}, ShapeMismatch),
        ({"data": GOOD["data"] + "AAAA"}, ShapeMismatch),
        ({"data": "!" * 1_000_000}, ShapeMismatch),
        ({"data": ""}, ShapeMismatch),
        ({"shape": [4]}, ShapeMismatch),
        ({"shape": [1] * 9}, RankTooHigh),
        ({"shape": [-3]}, InvalidTensorEntry),
        ({"shape": [3.0]}, InvalidTensorEntry),
        ({"shape": [True]}, InvalidTensorEntry),
        ({"shape": [2**53]}, InvalidTensorEntry),
        ({"shape": [10**5000]}, InvalidTensorEntry),
        ({"shape": "3"}, InvalidTensorEntry),
        ({"dtype": "object"}, UnsupportedDtype),
        ({"dtype": "I32"}, UnsupportedDtype),
        ({"dtype": "torch.torch.int32"}, UnsupportedDtype),
        ({"dtype": 3}, UnsupportedDtype),
        ({"encoding": "pickle"}, InvalidTensorEntry),
        ({"more": 1}, InvalidTensorEntry),
    ],
)
def test_malformed(change: dict[str, object], error: type[CodecError]) -> None:
    """Each kind of malformed JSON tensor has its error."""
    assert from_json(GOOD).shape == (3,)
    with pytest.raises(CodecError) as caught:
        from_json(GOOD | change)
    assert type(caught.value) is error and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "obj", [None, [], "x", {}, {"data": ""}, {k: v for k, v in GOOD.items() if k != "encoding"}]
)
def test_missing_fields(obj: object) -> None:
    """All four fields are required, and no object is no tensor."""
    with pytest.raises(InvalidTensorEntry, match="exactly"):
        from_json(obj)
