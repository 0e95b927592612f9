"""What an operation takes on this rank: the seconds of its parts; and memory: the most that it
took, what is free, and what an error says of it."""

from __future__ import annotations

import ctypes
import math
import resource
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from nexrl_host.processes import memory_groups

if TYPE_CHECKING:
    from nexrl_worker.training.fsdp2 import Collective

PARTS = ("forward", "backward", "step")
COMMUNICATION = "communication"
_LIBC = ctypes.CDLL(None)
_MIB = 1024.0 * 1024.0
_CANNOT_ALLOCATE = ("can't allocate memory", "not enough memory", "out of memory")
_RESET_PEAK = "5"  # proc(5): resets the peak resident set size


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


# -- memory


@dataclass
class Peak:
    """`mib` after the block: the peak, and `before`, what was held when it began. `since_start`
    marks a process's peak.

    On CUDA allocated device memory; else resident memory, mapped files included, whose peak is that
    of the whole process where the kernel allows no reset.
    """

    mib: float = 0.0
    before: float = 0.0
    since_start: bool = False


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure a block; costs two short reads of /proc, and on CUDA no synchronisation."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        peak.before = torch.cuda.memory_allocated(device) / _MIB
    else:
        try:
            Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
        except OSError:
            peak.since_start = True
        peak.before = _resident("VmRSS")
    try:
        yield peak
    finally:
        if device.type == "cuda":
            peak.mib = torch.cuda.max_memory_allocated(device) / _MIB
        else:
            peak.mib = _resident("VmHWM")


def held_mib(device: torch.device) -> float:
    """What this rank holds now: allocated device memory, else resident memory in use."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / _MIB
    give_back(device)  # what is free inside the process would be counted as taken
    return _resident("VmRSS")


def free_mib(device: torch.device, ranks: int) -> float:
    """What this rank can still take: free device memory, else its share of the host's among
    `ranks`.

    The host's is what the kernel calls available, within the limits of every control group around
    the process, and no more than the process's own limit on its addresses leaves.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + unused) / _MIB
    available = _numbers(Path("/proc/meminfo")).get("MemAvailable:", math.inf) / 1024.0
    known = [available, *_left_in_control_groups()]
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    own = math.inf if most == resource.RLIM_INFINITY else most / _MIB - _resident("VmSize")
    return max(min(min(known) / ranks, own), 0.0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error) if isinstance(error, RuntimeError) else ""
    return any(words in said for words in _CANNOT_ALLOCATE)


def give_back(device: torch.device) -> None:
    """Return what is free inside the process, after memory ran out."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


def _left_in_control_groups() -> Iterator[float]:
    """MiB left in each control group, version 2 and 1; page cache counts as free."""
    for version, folder in memory_groups():
        names = ("memory.max", "memory.current")
        if version == 1:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, now = ("".join(_lines(folder / name)) for name in names)
        if limit.isdigit() and now.isdigit():
            cached = _numbers(folder / "memory.stat").get("inactive_file", 0.0)
            yield (int(limit) - int(now) + cached) / _MIB


def _numbers(path: Path) -> dict[str, float]:
    """The first number of every line, by its first word."""
    split = (line.split() for line in _lines(path))
    return {words[0]: float(words[1]) for words in split if len(words) > 1}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _resident(field: str) -> float:
    """MiB of a line of /proc/self/status, else the process's peak as the C library knows it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0
    return next(float(line.split()[1]) / 1024.0 for line in lines if line.startswith(f"{field}:"))
