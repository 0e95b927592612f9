"""Every limit of the codec, by name. What is above one is refused when written and when read."""

from __future__ import annotations

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
