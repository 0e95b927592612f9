"""Children that die with their parent, on Linux (elsewhere the supervisor's own clean-up has to
do): how one ended, their memory and their logs."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import signal
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_LOG_BYTES = 16 * 1024 * 1024
_OLDER_LOGS = 2
# Linux 6.15: _IOWR(0xFF, 11, struct pidfd_info of 64 bytes), whose mask asks for, and then has, the
# wait status.
_PIDFD_GET_INFO, _PIDFD_INFO_BYTES, _PIDFD_INFO_EXIT, _STATUS_AT = 0xC040FF0B, 64, 1 << 3, 60


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


def how_it_ended(status: int | None, oom_kills: int) -> str:
    """In words, by the wait status and what the kernel killed meanwhile for want of memory, see
    `oom_kills`."""
    if status is None:
        return "was killed or crashed"
    if not os.WIFSIGNALED(status):
        return f"ended with exit code {os.waitstatus_to_exitcode(status)}"
    number = os.WTERMSIG(status)
    if number == signal.SIGKILL and oom_kills > 0:
        return (
            f"was killed by SIGKILL, out of memory (the kernel has killed {oom_kills} for want of "
            "memory since the group began),"
        )
    verb = (
        "was killed by"
        if number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
        else "crashed with"
    )
    return f"{verb} {signal_name(number)}"


def signal_name(number: int) -> str:
    """SIGKILL, or `signal 34` where it has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def oom_kills(root: Path = Path("/")) -> int:
    """How many processes the kernel has killed for want of memory, in this process's control group:
    its ranks are in it, too.

    Where no control group counts, on the host, others' included; 0 where that does not say either.
    """
    names = {2: "memory.events", 1: "memory.oom_control"}
    counters = [folder / names[version] for version, folder in memory_groups(root)]
    for counter in (*counters, root / "proc/vmstat"):
        with suppress(OSError):
            for line in counter.read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0


def wait_status(descriptor: int) -> int | None:
    """Of a process that is another's child and has been waited for; None before, and where the
    kernel is too old to tell."""
    info = bytearray(_PIDFD_INFO_BYTES)
    struct.pack_into("Q", info, 0, _PIDFD_INFO_EXIT)
    try:
        fcntl.ioctl(descriptor, _PIDFD_GET_INFO, info)
    except OSError:
        return _zombie_status(descriptor)
    has: int = struct.unpack_from("Q", info)[0]
    status: int = struct.unpack_from("i", info, _STATUS_AT)[0]
    return status if has & _PIDFD_INFO_EXIT else _zombie_status(descriptor)


def _zombie_status(descriptor: int) -> int | None:
    """The wait status of a process that nobody has waited for yet."""
    try:
        lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
        pid = next(line.split()[1] for line in lines if line.startswith("Pid:"))
        state, *_, status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, StopIteration):
        return None
    return int(status) if state == "Z" else None


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
