"""What this machine offers: its GPUs, and room on its disks. Whoever asks must count alike."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pynvml  # type: ignore[import-untyped] # the package has no types

CPU_SLOTS = 4
"""Ranks that a machine without GPUs offers, unless told otherwise."""
_NEEDED_MB = 32
_MB = 1024**2


def lack_of_room(folder: Path) -> str | None:
    """What to do about the disk of ``folder`` where it has no room for the service's own records,
    None while it has."""
    try:
        disk = os.statvfs(folder)
    except OSError:  # a folder that is gone is no full one
        return None
    missing = _NEEDED_MB - disk.f_bavail * disk.f_frsize / _MB
    if missing > 0:
        return f"the disk of {folder} is full: free {math.ceil(missing)} MB"
    if disk.f_files and not disk.f_favail:
        return f"the disk of {folder} is full: it takes no more files, so delete some"
    return None


def visible_gpus() -> tuple[str, ...]:
    """Those of CUDA_VISIBLE_DEVICES where it is set (set but empty: none), else all by the driver's
    numbers; none without a driver."""
    try:
        pynvml.nvmlInit()
        try:
            listed = [str(number) for number in range(pynvml.nvmlDeviceGetCount())]
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return ()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = listed if chosen is None else [name.strip() for name in chosen.split(",")]
    return tuple(name for name in names if name not in ("", "-1"))
