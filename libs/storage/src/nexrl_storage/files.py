"""Files and folders that are wholly there or not: written beside their place, synced, renamed or
swapped."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePath

_NAMED = 5
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def write_file(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``, synced; a crash leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_folder(new: Path, path: Path, remove: Callable[[Path], None] | None = None) -> None:
    """Put ``new`` (a folder, or a link) at ``path``, its sibling, synced; then remove what was
    there, if it can be.

    Linux swaps the two in one step; elsewhere ``path`` is missing between two renames. ``remove``
    gets the former ``path`` under its hidden name; without it, all of that is deleted.
    """
    aside = _put(new, path)
    sync_folder(path.parent)
    if aside is not None:
        with contextlib.suppress(OSError):
            (remove or remove_folder)(aside)


def _put(new: Path, path: Path) -> Path | None:
    """Returns where the former ``path`` is now, None if nothing (or an empty folder) was there."""
    try:
        os.rename(new, path)
        return None
    except OSError as error:
        if error.errno not in _OCCUPIED:
            raise
    if _exchange(new, path):
        return new
    aside = new.with_name(f"{new.name}.old")
    os.rename(path, aside)
    os.rename(new, path)
    return aside


def remove_folder(folder: Path) -> None:
    """Delete a folder (or a link to one, never what it points to); a missing one is no error."""
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
        return
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return


def unlisted(folder: Path, names: Iterable[str]) -> list[str]:
    """What lies in ``folder`` besides the files ``names`` and the folders on the way to them:
    relative paths, sorted.

    A folder or a link that is not on the way stands for all that is in it.
    """
    files = set(names)
    ways = _ways(files)
    found: list[str] = []
    for way in ways:
        if _through_link(folder, way) or not (folder / way).is_dir():
            continue
        for entry in os.scandir(folder / way):
            name = str(PurePath(way, entry.name))
            if name not in (ways if entry.is_dir(follow_symlinks=False) else files):
                found.append(name)
    return sorted(found)


def first_few(names: Sequence[str]) -> str:
    """Names for a message: the first five, and how many more."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def remove_listed(folder: Path, names: Iterable[str], record: str) -> None:
    """Delete the files ``names``, then ``record`` (the file that lists them), and ``folder`` if it
    is empty then.

    Whatever others put there stays, and nothing is reached through a link. A killed removal can be
    repeated as long as ``record`` is there.
    """
    files = [name for name in names if name != record]
    for name in files:
        if not _through_link(folder, str(PurePath(name).parent)):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                (folder / name).unlink()
    for way in sorted(_ways(files) - {"."}, reverse=True):
        with contextlib.suppress(OSError):
            (folder / way).rmdir()
    (folder / record).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _ways(names: Iterable[str]) -> set[str]:
    """The folders that lead to ``names``; ``.`` is always one."""
    return {".", *(str(way) for name in names for way in PurePath(name).parents)}


def _through_link(folder: Path, way: str) -> bool:
    parts = PurePath(way).parts
    return any(folder.joinpath(*parts[: count + 1]).is_symlink() for count in range(len(parts)))


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
