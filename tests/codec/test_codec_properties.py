"""Round trips over all dtypes and layouts, and random bytes, from which only CodecError may
come."""

from __future__ import annotations

import contextlib
import json
import random

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_codec import MAX_NAME_LENGTH, CodecError, encode, from_json, parse_header, wrap
from tensor_codec._checks import CODES

DTYPES = list(CODES)
NAMES = st.text(
    st.characters(exclude_categories=["Cs"]), min_size=1, max_size=MAX_NAME_LENGTH
).filter(lambda n: n != "__metadata__")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Random bits under any dtype, rank 0 to 4, contiguous, transposed, strided or a slice of
    something larger."""
    dtype = getattr(torch, draw(st.sampled_from(DTYPES)))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    bits = torch.randint(
        0, 2 if dtype is torch.bool else 256, [*shape, 8], dtype=torch.uint8, generator=generator
    )
    tensor = bits[..., : dtype.itemsize].contiguous().view(dtype).reshape(shape)
    layout = draw(st.sampled_from(["whole", "turned", "strided", "part"]))
    if not shape or layout == "whole":
        return tensor
    return {"turned": tensor.transpose(0, -1), "strided": tensor[::2], "part": tensor[1:]}[layout]


def bits(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes, by which NaNs compare equal too."""
    fresh = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
    return fresh.view(torch.uint8).numpy().tobytes()


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(NAMES, tensors(), max_size=5), st.dictionaries(TEXTS, TEXTS, max_size=3))
def test_round_trip(batch: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """What is encoded comes back bit for bit, with dtype, shape and metadata, through both
    libraries."""
    mixed = {
        name: tensor.numpy() if index % 2 and tensor.dtype != torch.bfloat16 else tensor
        for index, (name, tensor) in enumerate(batch.items())
    }
    encoded = encode(mixed, metadata)
    with wrap(bytearray().join(encoded)) as frame:
        assert frame.header.metadata == metadata and frame.header.tensors.keys() == batch.keys()
        assert frame.header.total_size == len(encoded)
        for name, tensor in batch.items():
            read = frame.torch(name)
            assert (
                read.dtype == tensor.dtype
                and read.shape == tensor.shape
                and bits(read) == bits(tensor)
            )
            if tensor.dtype != torch.bfloat16:
                array = frame.numpy(name)
                assert str(array.dtype) == str(tensor.dtype).removeprefix(
                    "torch."
                ) and array.shape == tuple(tensor.shape)
                assert array.tobytes() == bits(tensor)


def read_all(data: bytes) -> None:
    """Do everything with a frame that may be broken."""
    with wrap(data) as frame:
        for name, info in frame.header.tensors.items():
            frame.numpy(name, widen=True)
            frame.torch(name, slice(0, 1) if info.shape else None)


def broken(rng: random.Random, good: bytes) -> bytes:
    """A sound frame with a few bytes changed, cut, repeated or made up."""
    data = bytearray(good)
    for _ in range(rng.randint(1, 4)):
        where, kind = rng.randrange(len(data) + 1), rng.randrange(5)
        if kind == 0:
            data[where : where + 1] = rng.randbytes(1)
        elif kind == 1:
            data[where : where + 1] = rng.choice(
                [b"0", b"9", b"-", b'"', b"{", b"}", b"[", b"]", b",", b".", b"e"]
            )
        elif kind == 2:
            del data[where : where + rng.randint(1, 20)]
        elif kind == 3:
            data[where:where] = data[where : where + rng.randint(1, 60)]
        else:
            data[where:where] = rng.randbytes(rng.randint(1, 8))
    return bytes(data)


def test_fuzz_frames() -> None:
    """5000 seeded broken frames raise CodecError or read; many of each kind of error occur."""
    rng = random.Random(20240607)
    good = encode(
        {"a": np.arange(6).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}, {"k": "v"}
    ).tobytes()
    seen: set[str] = set()
    for _ in range(5000):
        data = broken(rng, good) if rng.random() < 0.8 else rng.randbytes(rng.randrange(200))
        try:
            read_all(data)
            seen.add("read")
        except CodecError as error:
            seen.add(type(error).__name__)
            assert len(str(error)) < 600 and str(error).isascii()
    assert {
        "read",
        "SizeMismatch",
        "HeaderTruncated",
        "InvalidHeaderJSON",
        "InvalidTensorEntry",
        "ShapeMismatch",
    } <= seen
    assert len(seen) >= 9


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8"]) | JSON_VALUES,
        "shape": st.lists(st.integers(0, 3), max_size=3)
        | st.lists(st.integers(), max_size=10)
        | JSON_VALUES,
        "data_offsets": st.tuples(st.integers(0, 12), st.integers(0, 12)) | JSON_VALUES,
    }
)
HEADERS = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__"]) | st.text(max_size=4),
    ENTRY | JSON_VALUES,
    max_size=3,
)


@settings(max_examples=200, deadline=None)
@given(HEADERS, st.binary(max_size=16))
def test_headers_of_any_json(entries: object, data: bytes) -> None:
    """Any JSON in the header's place is read or refused by name."""
    text = json.dumps(entries).encode()
    frame = len(text).to_bytes(8, "little") + text + data
    with contextlib.suppress(CodecError):
        parse_header(frame)
        read_all(frame)


@settings(max_examples=200, deadline=None)
@given(
    JSON_VALUES
    | st.fixed_dictionaries(
        {
            "data": st.text("AQ=+/ -", max_size=12) | JSON_VALUES,
            "shape": st.lists(st.integers(0, 3), max_size=3) | JSON_VALUES,
            "dtype": st.sampled_from(["int8", "torch.bfloat16"]) | JSON_VALUES,
            "encoding": st.just("base64") | JSON_VALUES,
        }
    )
)
def test_json_tensors_of_any_json(obj: object) -> None:
    """Any JSON in a tensor's place is read or refused by name."""
    with contextlib.suppress(CodecError):
        from_json(obj).torch()
