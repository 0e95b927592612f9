"""What this machine offers to groups: the agent, and whoever starts it, must count alike."""

from __future__ import annotations

import os
import subprocess

CPU_SLOTS = 4
"""Ranks that a machine without GPUs offers, unless told otherwise."""


def visible_gpus() -> tuple[str, ...]:
    """Those of CUDA_VISIBLE_DEVICES where it is set (set but empty: none), else all by nvidia-smi's numbers; none without a driver."""
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return ()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = listed if chosen is None else [name.strip() for name in chosen.split(",")]
    return tuple(name for name in names if name not in ("", "-1"))
