"""Bytes on their way out: views of tensors, cut into parts and chunks without a copy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import xxhash

CHUNK_BYTES = 1024 * 1024
"""One send() each: the socket's time-out is per send, so a slow line needs small ones."""


class Body:
    """A request body that can be sent again: iterating yields chunks, len() is the bytes.

    on_bytes hears of each chunk that was sent, and of a restart as a negative number.
    """

    def __init__(
        self, views: Sequence[bytes | memoryview], on_bytes: Callable[[int], None] | None = None
    ) -> None:
        self._views = [memoryview(view).cast("B") for view in views if len(view)]
        self._on_bytes = on_bytes or _ignore
        self._sent = 0
        self._seconds = 0.0

    def __len__(self) -> int:
        return sum(view.nbytes for view in self._views)

    def __iter__(self) -> Iterator[memoryview]:
        self._on_bytes(-self._sent)
        self._sent = 0
        start = time.monotonic()
        for view in self._views:
            for position in range(0, view.nbytes, CHUNK_BYTES):
                chunk = view[position : position + CHUNK_BYTES]
                yield chunk
                self._sent += chunk.nbytes
                self._on_bytes(chunk.nbytes)
                self._seconds = time.monotonic() - start

    def take_seconds(self) -> float:
        """How long sending took since the last call of this."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class Part:
    """Some consecutive bytes of a frame, as views of it: iterating yields them, len() is their
    bytes."""

    def __init__(self, views: Sequence[memoryview]) -> None:
        self.views = tuple(views)

    def __len__(self) -> int:
        return sum(view.nbytes for view in self.views)

    def __iter__(self) -> Iterator[memoryview]:
        return iter(self.views)

    def checksum(self) -> str:
        """xxh3-128 of the bytes, in hex."""
        digest = xxhash.xxh3_128()
        for view in self.views:
            digest.update(view)
        return digest.hexdigest()


def cut(views: Sequence[bytes | memoryview], max_size: int) -> list[Part]:
    """Parts of at most max_size bytes that make up the views in order; all but the last are
    full."""
    parts: list[Part] = []
    current: list[memoryview] = []
    room = max_size
    for view in (memoryview(view).cast("B") for view in views if len(view)):
        position = 0
        while position < view.nbytes:
            piece = view[position : position + room]
            current.append(piece)
            position += piece.nbytes
            room -= piece.nbytes
            if room == 0:
                parts.append(Part(current))
                current, room = [], max_size
    return [*parts, Part(current)] if current else parts


def _ignore(_: int) -> None:
    return None
