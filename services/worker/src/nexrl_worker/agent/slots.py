"""The agent's slots: GPUs by index or by UUID, or a number of CPU ranks."""

from __future__ import annotations

import threading


class Slots:
    """Counts what is free; safe between the placing thread and the watching ones."""

    def __init__(self, total: int, gpus: tuple[str, ...]) -> None:
        self._lock = threading.Lock()
        self._total = total
        self._free = total
        self._order = gpus
        self._gpus = list(gpus[:total])

    @property
    def free(self) -> int:
        """Slots that no group holds."""
        return self._free

    def take(self, count: int) -> tuple[str, ...]:
        """Reserve ``count`` slots; the GPUs that come with them, none on CPU."""
        with self._lock:
            assert count <= self._free
            self._free -= count
            taken, self._gpus = tuple(self._gpus[:count]), self._gpus[count:]
            return taken

    def give_back(self, count: int, gpus: tuple[str, ...]) -> None:
        """The inverse of :meth:`take`."""
        with self._lock:
            self._free += count
            self._gpus = sorted([*self._gpus, *gpus], key=self._order.index)

    def shortage(self, count: int, agent: str) -> str:
        """Why a group of ``count`` ranks waits."""
        return f"{count} slots: {self._free} of {self._total} are free on agent {agent}"
