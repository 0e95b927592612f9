"""Where the seconds of an update go: forward, backward, step, and the collectives inside them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from nexrl_worker.training.fsdp2 import Collective

PARTS = ("forward", "backward", "step")
COMMUNICATION = "communication"


class Clock:
    """Sums seconds by name on one rank. On CUDA it records events, and only `seconds` waits for the
    device.

    `communication` is the time that FSDP's all-gathers and reduce-scatters take (on the CPU: that
    this rank waits for them); it lies inside forward and backward, and on CUDA beside their
    computation.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: list[tuple[str, Any, Any]] = []
        self._sums: dict[str, float] = {}
        self._runs = False

    def start(self) -> None:
        """Begin anew; until then, and after `seconds`, nothing is measured."""
        self._open, self._sums, self._runs = [], {}, True

    def watch(self, collectives: Iterable[Collective]) -> None:
        """Measure those of a sharded model."""
        for one in collectives:
            one.measure = partial(self.measure, COMMUNICATION)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the block's seconds to `name`, whether it raises or not."""
        if not self._runs:
            yield
            return
        begin = self._now()
        try:
            yield
        finally:
            end = self._now()
            if self._device.type == "cuda":
                self._open.append((name, begin, end))
            else:
                self._sums[name] = self._sums.get(name, 0.0) + end - begin

    def seconds(self) -> dict[str, float]:
        """Seconds of every part since `start`; waits for the device once."""
        if self._open:
            torch.cuda.synchronize(self._device)
        for name, begin, end in self._open:
            self._sums[name] = self._sums.get(name, 0.0) + begin.elapsed_time(end) / 1000.0
        self._open = []
        sums, self._sums, self._runs = self._sums, {}, False
        return {name: sums.get(name, 0.0) for name in (*PARTS, COMMUNICATION)}

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event
