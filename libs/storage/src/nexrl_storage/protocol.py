"""The seam behind which checkpoints lie: six verbs on URIs, whatever storage is there.

A URI without a scheme is a path of the local file system, the one storage so far. Names below a URI
are joined with a slash on every storage.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BufferedIOBase
from typing import Literal, NamedTuple, Protocol

from nexrl_contract.errors import ServiceError

Uri = str | os.PathLike[str]
Kind = Literal["file", "folder", "link"]
_NAMED = 5
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_SUCH_PLACE = (
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
)


class Entry(NamedTuple):
    """What lies at a URI; ``inside``: the names in a folder, and what each one is."""

    kind: Kind
    inside: Mapping[str, Kind] = {}


class Written(NamedTuple):
    """What was written: ``size`` in bytes, ``sha256`` in hex."""

    size: int
    sha256: str


class Storage(Protocol):
    """A file system as far as checkpoints need one. Every verb raises OSError.

    What a verb has changed survives a power cut once it has returned.
    """

    def look(self, uri: Uri) -> Entry | None:
        """What lies there, None for nothing. A link is one, wherever it leads."""

    def open(self, uri: Uri) -> BufferedIOBase:
        """A file, to be read; links are followed."""

    def write(
        self, uri: Uri, content: Iterable[bytes | memoryview], *, more: bool = False
    ) -> Written:
        """Make or replace a file, hashed on the way; a crash leaves the old one or the new one.

        The folders above it are made. ``more``: another write into the same folder follows, and it
        is enough that this file survives a power cut from then on.
        """

    def make(self, uri: Uri) -> None:
        """Make a folder and those above it; one that is there is no error."""

    def move(self, source: Uri, target: Uri, *, replace: bool = False) -> str | None:
        """Rename a file, folder or link: at no moment is a half of it at ``target``.

        An empty folder at ``target`` counts as nothing. For anything else FileExistsError is
        raised, or with ``replace`` both change places: returns where the former ``target`` is now,
        a hidden sibling of it.
        """

    def remove(self, uri: Uri, *, recursive: bool = False) -> None:
        """Delete a file, a link (never what it leads to) or a folder; a missing one is no error.

        A folder must be empty unless ``recursive``.
        """


def join(uri: Uri, *names: str) -> str:
    """The URI of what ``names`` lead to below ``uri``."""
    return posixpath.join(os.fspath(uri), *names)


def sibling(uri: Uri, name: str) -> str:
    """The URI of ``name`` in the same folder."""
    return posixpath.join(posixpath.dirname(os.fspath(uri)), name)


def first_few(names: Sequence[str]) -> str:
    """Names for a message: the first five, and how many more."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def no_space(error: Exception) -> bool:
    """Whether a disk or a quota is full, or a file as large as this process may make one."""
    return isinstance(error, OSError) and error.errno in _NO_SPACE


@contextlib.contextmanager
def full_disk(uri: Uri) -> Iterator[None]:
    """Turns a full disk or quota into ``NO_SPACE``."""
    try:
        yield
    except OSError as error:
        if not no_space(error):
            raise
        message = f"no space is left to write {uri}; free some and save again"
        raise ServiceError("NO_SPACE", message) from error


@contextlib.contextmanager
def place_of_the_caller(uri: Uri) -> Iterator[None]:
    """As :func:`full_disk`; and a place that the storage does not allow is ``PATH_REFUSED``."""
    try:
        with full_disk(uri):
            yield
    except OSError as error:
        if error.errno not in _NO_SUCH_PLACE:
            raise
        raise refused(uri, f"cannot be made: {error.strerror}") from None


def refused(uri: Uri, why: str, way_out: str = "remove it yourself") -> ServiceError:
    """``PATH_REFUSED`` of the place that the caller gave, with what to do."""
    message = f"{uri} {why}; choose another path, or {way_out}"
    return ServiceError("PATH_REFUSED", message, key="local_path")


def invalid(message: str, **details: str) -> ServiceError:
    """``CHECKPOINT_INVALID``, with what is wrong."""
    return ServiceError("CHECKPOINT_INVALID", message, **details)
