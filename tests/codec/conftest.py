"""Ways to make frames by hand, sound ones and broken ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest


def build(entries: object, data: bytes = b"") -> bytes:
    """A frame with this JSON (text as it stands, anything else dumped) and these bytes of data."""
    text = entries.encode() if isinstance(entries, str) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.fixture
def frame_of() -> Callable[..., bytes]:
    """build(entries, data): the bytes of a frame, checked by nobody."""
    return build


@pytest.fixture
def entry() -> Callable[..., dict[str, Any]]:
    """entry(dtype, shape, start, end): one tensor's description."""

    def make(dtype: object, shape: object, start: object, end: object) -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}

    return make
