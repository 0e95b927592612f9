"""Bytes to files: writing without copies, reserving room, naming failures, locks that a killed
process lets go of."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nexrl_contract.errors import ServiceError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LASTING = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
_MAX_VIEWS = 512  # system calls take 1024 at most
_COPY_BYTES = 1024 * 1024


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn the operating system's refusals into NO_SPACE or STORE_UNAVAILABLE."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise ServiceError(
                "NO_SPACE",
                (
                    "the payload store's disk is full: free space in its folder, or send the batch "
                    "later"
                ),
            ) from error
        raise store_unavailable("failed", error) from error


def store_unavailable(what: str, error: OSError) -> ServiceError:
    """The folder cannot be used; a service that may not write there does not come to by waiting."""
    message = f"the payload store's folder {what}: {error.strerror}"
    return ServiceError("STORE_UNAVAILABLE", message, retryable=error.errno not in _LASTING)


def create_file(path: Path) -> int:
    """A descriptor of a new file of mode 0600, for reading and writing."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def unique(prefix: str) -> str:
    """``prefix`` and 16 hex digits that nobody else has."""
    return f"{prefix}{secrets.token_hex(8)}"


def reserve(fd: int, offset: int, nbytes: int) -> None:
    """Take room for bytes to come, so that a full disk is known before they are sent (and writes
    are faster)."""
    if nbytes == 0 or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(fd, offset, nbytes)
    except OSError as error:
        if error.errno not in (
            errno.EOPNOTSUPP,
            errno.EINVAL,
            errno.ENOSYS,
        ):  # a file system without it
            raise


def write_at(fd: int, views: Sequence[memoryview], offset: int) -> int:
    """Write flat views at ``offset`` and return the offset after them."""
    pending = list(reversed(views))
    while pending:
        batch = pending[: -_MAX_VIEWS - 1 : -1]
        written = os.pwritev(fd, batch, offset)
        offset += written
        while pending and written >= pending[-1].nbytes:
            written -= pending.pop().nbytes
        if written:
            pending[-1] = pending[-1][written:]
    return offset


def copy_bytes(source: int, target: int, start: int, offset: int, nbytes: int) -> None:
    """Copy ``nbytes`` from ``start`` of one file to ``offset`` of another."""
    kept = memoryview(bytearray(min(nbytes, _COPY_BYTES)))
    while nbytes:
        count = os.preadv(source, [kept[: min(nbytes, _COPY_BYTES)]], start)
        if count == 0:
            raise OSError(errno.EIO, "a part is shorter than it was")
        offset = write_at(target, [kept[:count]], offset)
        start += count
        nbytes -= count


def sync_folder(folder: Path) -> None:
    """Make renames in the folder survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, data: bytes, *, fsync: bool) -> None:
    """Replace a small file at once: readers see the old or the new content."""
    temporary = path.with_name(unique("tmp-"))
    fd = create_file(temporary)
    try:
        write_at(fd, [memoryview(data)], 0)
        if fsync:
            os.fsync(fd)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    if fsync:
        sync_folder(path.parent)


def try_lock(fd: int) -> bool:
    """Take the file's lock unless another holder has it; it ends with the descriptor."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file (made if missing) that other threads, processes and hosts take for
    moments only."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
