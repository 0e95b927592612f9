"""Children that die with their parent, on Linux; elsewhere the supervisor's own clean-up has to do."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to kill this process when the *thread* that forked it ends.

    Call it first thing in the child, or pass it as ``preexec_fn`` from a main thread. ``parent`` is the expected parent's id:
    a parent that died before the call cannot be noticed otherwise.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)
