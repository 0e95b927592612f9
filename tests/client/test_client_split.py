"""split_for_requests: parts of a frame, without a copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensor_codec
import xxhash
from nexrl_client import InvalidBatch, Part, split_for_requests


def joined(parts: list[Part]) -> bytes:
    return b"".join(view for part in parts for view in part)


@pytest.mark.parametrize("size", [1, 7, 64, 100, 10_000])
def test_parts_are_the_frame(size: int) -> None:
    """Whatever the size, the parts join to the frame, none is larger, and all but the last are
    full."""
    frame = tensor_codec.encode(
        {"a": np.arange(50), "b": np.zeros((0, 3)), "c": np.ones(3, bool)}, {"k": "v"}
    )
    parts = split_for_requests(frame, size)
    assert joined(parts) == frame.tobytes()
    assert {len(part) for part in parts[:-1]} <= {size}
    assert 0 < len(parts[-1]) <= size
    assert all(part.checksum() == xxhash.xxh3_128(b"".join(part)).hexdigest() for part in parts)


def test_no_copy() -> None:
    """Parts view the tensors' memory."""
    array = np.zeros(1000)
    parts = split_for_requests(tensor_codec.encode({"a": array}), 1000)
    array[:] = 7
    assert np.frombuffer(joined(parts)[-8000:])[0] == 7


def test_a_batch(batch: dict[str, Any]) -> None:
    """A batch is its frame, every tensor of it; the default keeps a small one whole."""
    (part,) = split_for_requests(batch)
    frame = tensor_codec.wrap(b"".join(part))
    assert set(frame.header.tensors) == set(batch["tensors"])
    assert len(split_for_requests(b"12345", max_size=2)) == 3


def test_refusals(batch: dict[str, Any]) -> None:
    """A size that holds nothing and a batch that is none are ValueErrors."""
    with pytest.raises(ValueError, match="max_size"):
        split_for_requests(batch, 0)
    with pytest.raises(InvalidBatch):
        split_for_requests({"input_ids": 3})
