"""The most memory that an operation took on this rank."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_LIBC = ctypes.CDLL(None)
_MIB = 1024.0 * 1024.0
_RESET_PEAK = "5"  # proc(5): resets the peak resident set size


@dataclass
class Peak:
    """`mib` after the block: the peak, and `before`, what was held when it began. `since_start` marks a process's peak.

    On CUDA allocated device memory; else resident memory, mapped files included, whose peak is that of the whole
    process where the kernel allows no reset.
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
        peak.since_start = not _reset()
        peak.before = _resident("VmRSS")
    try:
        yield peak
    finally:
        peak.mib = torch.cuda.max_memory_allocated(device) / _MIB if device.type == "cuda" else _resident("VmHWM")


def held_mib(device: torch.device) -> float:
    """What this rank holds now: allocated device memory, else the process's resident memory that is in use."""
    if device.type != "cuda" and hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)  # what is free inside the process would be counted as taken
    return torch.cuda.memory_allocated(device) / _MIB if device.type == "cuda" else _resident("VmRSS")


def _reset() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _resident(field: str) -> float:
    """MiB of a line of /proc/self/status; where there is none, the process's peak as the C library knows it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0
    return next(float(line.split()[1]) / 1024.0 for line in lines if line.startswith(f"{field}:"))
