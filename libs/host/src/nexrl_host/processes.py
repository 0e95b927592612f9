"""Children that die with their parent, on Linux (elsewhere the supervisor's own clean-up has to
do), their logs and memory."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_LOG_BYTES = 16 * 1024 * 1024
_OLDER_LOGS = 2


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to kill this process when the *thread* that forked it ends.

    Call it first thing in the child, or pass it as ``preexec_fn`` from a main thread. ``parent`` is
    the expected parent's id: a parent that died before the call cannot be noticed otherwise.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def memory_groups(root: Path = Path("/")) -> Iterator[tuple[int, Path]]:
    """The folders of the control groups around this process that count memory, its own first, each
    with its version (2 or 1).

    In a container some may not be there: it may see the paths of its host.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds in ("", "memory"):
            top, inner = root / "sys/fs/cgroup" / kinds, Path(path.lstrip("/"))
            for one in (inner, *inner.parents):
                yield 1 if kinds else 2, top / one


def log_limit() -> int:
    """Bytes that a log may hold before it is begun anew, of ``NEXRL_LOG_BYTES``; raises ValueError
    naming it."""
    text = os.environ.get("NEXRL_LOG_BYTES") or str(_LOG_BYTES)
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError(f"NEXRL_LOG_BYTES must be a positive integer, not {text!r}")
    return int(text)


def older_logs(path: Path) -> list[Path]:
    """Where what a log held before may be, oldest first."""
    return [path.with_name(f"{path.name}.{age}") for age in range(_OLDER_LOGS, 0, -1)]


def rotate_logs(folder: Path, limit: int) -> None:
    """Begin anew those logs of a folder that hold ``limit`` bytes or more, keeping what the last
    two held.

    Their writers have them open, native libraries too, and append: so the bytes are copied and the
    file is cut. A line written between the two, a matter of microseconds, is lost.
    """
    for path in folder.glob("*.log"):
        with suppress(OSError):  # a full disk, for which no log is cut: the next look tries again
            if path.stat().st_size >= limit:
                _rotate(path)


def _rotate(path: Path) -> None:
    *others, newest = older_logs(path)
    copy = path.with_name(f"{path.name}.copy")
    try:
        with path.open("rb") as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target)
            for older, younger in zip(others, [*others[1:], newest], strict=True):
                if younger.exists():
                    younger.replace(older)
            copy.replace(newest)  # before the cut, after which a reader looks for the rest in it
            shutil.copyfileobj(source, target)  # what came meanwhile
            target.flush()
            os.truncate(path, 0)
    except OSError:
        copy.unlink(missing_ok=True)
        raise
