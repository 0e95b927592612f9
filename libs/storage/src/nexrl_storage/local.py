"""Checkpoints in the local file system, or in one that is mounted there."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterable
from io import BufferedIOBase
from pathlib import Path

from nexrl_storage.protocol import Entry, Kind, Uri, Written

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


class LocalStorage:
    """:class:`nexrl_storage.protocol.Storage` on paths, synced before a verb returns."""

    def look(self, uri: Uri) -> Entry | None:
        """Never follows a link."""
        try:
            kind = _kind(os.lstat(uri).st_mode)
            if kind != "folder":
                return Entry(kind)
            with os.scandir(uri) as found:
                return Entry(kind, {item.name: _kind_of(item) for item in found})
        except (FileNotFoundError, NotADirectoryError):
            return None

    def open(self, uri: Uri) -> BufferedIOBase:
        """Raises IsADirectoryError for a folder."""
        return open(uri, "rb")

    def write(
        self, uri: Uri, content: Iterable[bytes | memoryview], *, more: bool = False
    ) -> Written:
        """Written beside its place, synced, renamed."""
        path = Path(uri)
        temporary = path.with_name(f".{path.name}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        try:
            with open(temporary, "wb") as file:
                for piece in content:
                    digest.update(piece)
                    file.write(piece)
                size = file.tell()
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if not more:
            sync_folder(path.parent)
        return Written(size, digest.hexdigest())

    def make(self, uri: Uri) -> None:
        """Raises FileExistsError where a file lies."""
        Path(uri).mkdir(parents=True, exist_ok=True)

    def move(self, source: Uri, target: Uri, *, replace: bool = False) -> str | None:
        """Linux swaps the two in one step; elsewhere ``target`` is missing between two renames."""
        former = _put(Path(source), Path(target), replace)
        sync_folder(Path(target).parent)
        return former

    def remove(self, uri: Uri, *, recursive: bool = False) -> None:
        """Deletes a folder's files one by one: rename it first where no half may be seen."""
        path = Path(uri)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if path.is_symlink() or not path.is_dir():
                path.unlink()
            elif recursive:
                shutil.rmtree(path)
            else:
                path.rmdir()


def _put(new: Path, path: Path, replace: bool) -> str | None:
    """Rename; returns where the former ``path`` is now, None if nothing (or an empty folder) was
    there."""
    # Between this look and the rename another process may put a file or link there, which a rename
    # of a file or link would replace; a folder never replaces anything but an empty folder.
    if not os.path.lexists(path) or (path.is_dir() and not path.is_symlink()):
        try:
            os.rename(new, path)
            return None
        except OSError as error:
            if error.errno not in _OCCUPIED:
                raise
    if not replace:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    if _exchange(new, path):
        return str(new)
    if new.is_symlink() and path.is_symlink():
        os.replace(new, path)  # one step everywhere: the weight-sync link is never missing
        return None
    aside = new.with_name(f"{new.name}.old")
    os.rename(path, aside)
    # Here ``path`` is missing; whoever comes now finds the former one under its hidden name.
    os.rename(new, path)
    return str(aside)


def _exchange(left: Path, right: Path) -> bool:
    """Swap two paths in one step; False where the system or its file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if rename(_AT_FDCWD, os.fsencode(left), _AT_FDCWD, os.fsencode(right), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(left), None, str(right))


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _kind(mode: int) -> Kind:
    return "link" if stat.S_ISLNK(mode) else "folder" if stat.S_ISDIR(mode) else "file"


def _kind_of(item: os.DirEntry[str]) -> Kind:
    if item.is_symlink():
        return "link"
    return "folder" if item.is_dir(follow_symlinks=False) else "file"
