"""Memory kept from one payload to the next: fresh pages cost more than the copy into them."""

from __future__ import annotations

import mmap
import threading
import weakref

import numpy as np
from numpy.typing import NDArray

_ALIGNMENT = 64
_HUGE_PAGE = 2 * 1024 * 1024


class Loan:
    """One user's memory, handed out piece by piece. Every piece keeps it alive."""

    def __init__(self, root: NDArray[np.uint8]) -> None:
        self._root = root
        self._used = 0

    def take(self, nbytes: int) -> memoryview:
        """``nbytes`` of writable memory, aligned to a cache line; beyond the loan's size, memory of
        its own."""
        end = self._used + nbytes
        if end > self._root.nbytes:
            return memoryview(bytearray(nbytes))
        piece = self._root[self._used : end]
        self._used = end + -end % _ALIGNMENT
        return piece.data


class Arena:
    """Lends one kept buffer; while tensors still view it, the next loan gets a new buffer
    instead."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: mmap.mmap | None = None
        self._root: weakref.ref[NDArray[np.uint8]] | None = None

    def lend(self, nbytes: int, *, pieces: int) -> Loan:
        """Memory for ``pieces`` tensors of ``nbytes`` in all; pages that are never touched cost
        nothing."""
        nbytes += pieces * _ALIGNMENT
        with self._lock:
            free = self._root is None or self._root() is None
            if self._kept is None or not free or len(self._kept) < nbytes:
                self._kept = _reserve(nbytes)
            root = np.frombuffer(self._kept, np.uint8)
            self._root = weakref.ref(root)
            return Loan(root)


def _reserve(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(
        -1,
        max(nbytes + -nbytes % _HUGE_PAGE, _HUGE_PAGE),
        flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
    )
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
