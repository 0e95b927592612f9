"""Where the seconds of an update go: forward, backward, step, and the collectives inside them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nexrl_worker.training.observe.memory import is_out_of_memory

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


class Collective:
    """The all-gathers or the reduce-scatters of one sharded module, in the place of FSDP2's own.

    It counts them, so that a rank that has left a micro-batch on the way can go through it again,
    to issue those that the other ranks wait for and no other. `done` says whether a micro-batch
    finds one done before.
    """

    def __init__(self, done: Callable[[], bool] = lambda: False) -> None:
        self._done = done
        self.measure: Callable[[], AbstractContextManager[None]] = nullcontext
        self._issued = 0
        self._skips = 0

    def begin(self) -> None:
        """A micro-batch begins."""
        self._issued, self._skips = int(self._done()), 0

    def again(self) -> None:
        """The same micro-batch begins once more: as many as were issued until now only fill their
        outputs with 0."""
        self._skips = self._issued

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for a buffer."""
        return torch.empty(*size, dtype=dtype, device=device)

    def _issue(self, output: Tensor, issue: Callable[[], Any]) -> Any:
        if self._skips:
            self._skips -= 1
            output.zero_()
            return None
        with self.measure():
            try:
                work = issue()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise dist.DistError(
                    f"out of memory in a collective that may have begun: {error}"
                ) from error
        self._issued += 1
        return work


class AllGather(Collective):
    """As FSDP2 asks of a custom one."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> Any:
        """`input_tensor` of every rank in `output_tensor`."""
        # torch 2.13 renamed it.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return self._issue(
            output_tensor,
            lambda: gather(output_tensor, input_tensor, group=group, async_op=async_op),
        )


class ReduceScatter(Collective):
    """As FSDP2 asks of a custom one."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        """This rank's part of the sum over ranks in `output_tensor`."""
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        return self._issue(
            output_tensor,
            lambda: scatter(output_tensor, input_tensor, group=group, op=op, async_op=async_op),
        )
