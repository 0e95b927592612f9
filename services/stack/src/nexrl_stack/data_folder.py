"""The data folder belongs to one running stack at a time, and ``--fresh`` forgets what earlier ones
left in it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LOCK = "lock"


class Refused(Exception):
    """The stack cannot start as it was asked to; the message says what to do."""


@contextmanager
def locked(own_folder: Path) -> Iterator[None]:
    """Hold ``own_folder``; raises Refused when a running stack has it. The kernel frees it however
    the holder ends."""
    try:
        own_folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(own_folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise Refused(
            f"the data folder {own_folder.parent} cannot be written ({error.strerror}); give "
            "another --data"
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(_in_use(own_folder.parent, os.read(lock, 32).decode().strip())) from None
        with suppress(OSError):  # on a full disk; only the message for a second `nexrl up` needs it
            os.truncate(lock, 0)
            os.write(lock, str(os.getpid()).encode())
        yield
    finally:
        os.close(lock)


def forget(own_folder: Path) -> None:
    """Delete what earlier runs left, but no checkpoint: those lie outside. Call it while holding
    the lock."""
    for entry in own_folder.iterdir():
        if entry.name == _LOCK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _in_use(data: Path, holder: str) -> str:
    process = f" (process {holder})" if holder else ""
    return (
        f"the data folder {data} is in use by another `nexrl up`{process}; stop it or give "
        "another --data"
    )
