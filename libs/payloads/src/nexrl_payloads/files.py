"""Bytes to files: a new file that is hashed while it is written, locks that a killed process lets
go of, and names for the disk's failures."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nexrl_contract.errors import ServiceError
from nexrl_storage.local import sync_folder
from nexrl_storage.protocol import no_space

from .checks import BlockHasher
from .protocol import Chunk
from .rules import byte_views

_LASTING = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_MAX_VIEWS = 512  # system calls take 1024 at most


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn the operating system's refusals into NO_SPACE or STORE_UNAVAILABLE."""
    try:
        yield
    except OSError as error:
        if no_space(error):
            raise ServiceError(
                "NO_SPACE",
                "the payload store's disk is full: free space in its folder, or send the batch "
                "later",
            ) from error
        raise store_unavailable("failed", error) from error


def store_unavailable(what: str, error: OSError) -> ServiceError:
    """The folder cannot be used; a service that may not write there does not come to by waiting."""
    message = f"the payload store's folder {what}: {error.strerror}"
    return ServiceError("STORE_UNAVAILABLE", message, retryable=error.errno not in _LASTING)


class NewFile:
    """A file of mode 0600 on its way, under a temporary name; bytes are hashed as they come.

    Without a ``path`` they are hashed alone. Room for ``nbytes`` is taken at once, so that a full
    disk is known before they are sent. Raises NO_SPACE and STORE_UNAVAILABLE.
    """

    fd = -1
    """Open while the file may still be discarded."""
    start = 0
    """Where the bytes begin in it."""

    def __init__(self, path: Path | None, hasher: BlockHasher, nbytes: int | None) -> None:
        self._path = path
        self._hasher = hasher
        if path is not None:
            with disk_errors():
                self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self.reserve(nbytes)

    def reserve(self, nbytes: int | None) -> None:
        """Take room for what will be written."""
        with disk_errors():
            try:
                if nbytes and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self.fd, self.start, nbytes)
            except OSError as error:
                if error.errno not in _CANNOT_RESERVE:  # a file system without it
                    self.discard()
                    raise

    def write(self, *chunks: Chunk) -> None:
        """Append chunks. Raises MALFORMED above the length that the hasher knows of."""
        views = byte_views(chunks)
        offset = self.start + self._hasher.nbytes
        self._hasher.add(views)
        if self.fd >= 0:
            with disk_errors():
                write_at(self.fd, views, offset)

    def publish(self, target: Path, *, fsync: bool) -> None:
        """Give the file its name, replacing another; it is complete."""
        assert self._path is not None
        if fsync:
            os.fsync(self.fd)
        os.replace(self._path, target)
        self.close()
        if fsync:
            sync_folder(target.parent)

    def discard(self) -> None:
        """Remove the file, unless it has been published."""
        if self.fd >= 0 and self._path is not None:
            self.close()
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """What was written stays."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def unique(prefix: str) -> str:
    """``prefix`` and 16 hex digits that nobody else has."""
    return f"{prefix}{secrets.token_hex(8)}"


def write_at(fd: int, views: Sequence[memoryview], offset: int) -> None:
    """Write flat views at ``offset``."""
    pending = list(reversed(views))
    while pending:
        written = os.pwritev(fd, pending[: -_MAX_VIEWS - 1 : -1], offset)
        offset += written
        while pending and written >= pending[-1].nbytes:
            written -= pending.pop().nbytes
        if written:
            pending[-1] = pending[-1][written:]


def replace_file(path: Path, data: bytes, *, fsync: bool) -> None:
    """Replace a small file at once: readers see the old or the new content."""
    file = NewFile(path.with_name(unique("tmp-")), BlockHasher(path.name, None), len(data))
    try:
        file.write(data)
        file.publish(path, fsync=fsync)
    finally:
        file.discard()


def try_lock(fd: int) -> bool:
    """Take the file's lock unless another holder has it; it ends with the descriptor."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file (made if missing) against other threads, processes and hosts; a
    killed holder lets go of it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
