"""Gives a finished Hugging Face folder its name:

A link to the newest version (weight sync), or a folder of its own. Rank 0 only; local.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from nexrl_contract.errors import ServiceError
from nexrl_storage.files import first_few, remove_folder, remove_listed, replace_folder, unlisted
from nexrl_storage.manifest import EXPORT, MANIFEST, Export, read_export

from nexrl_worker.checkpoint.tensor_file import no_space

KEPT_VERSIONS = 2
_NO_SUCH_PLACE = (
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
)
_log = logging.getLogger(__name__)


class VersionedPath:
    """A path that is a link to one of its sibling folders ``.{name}.v{n}``, swapped by rename: the
    weight-sync folder.

    A reader that resolves the link once keeps its version until two newer ones are there.
    """

    def __init__(self, path: Path, identifier: str) -> None:
        self.path = path
        self._identifier = identifier
        self._temporary = path.with_name(f".{path.name}.new-{identifier}")
        self._pattern = re.compile(rf"\.{re.escape(path.name)}\.v(\d+)")

    def check(self) -> None:
        """Raises ``PATH_REFUSED`` where something lies that this group did not write for weight
        sync.

        Before any collective.
        """
        with _refusing(self.path):
            if self.path.is_symlink():
                target = self.path.parent / os.readlink(self.path)
                if (
                    target.parent != self.path.parent
                    or self._pattern.fullmatch(target.name) is None
                ):
                    raise _refused(self.path, "is a link that this service did not make")
            elif os.path.lexists(self.path):
                check_replaceable(self.path)
            record = _export(self.path)
        if record is not None and record.identifier != self._identifier:
            raise _refused(self.path, f"holds the weights of group {record.identifier!r}")

    def begin(self) -> Path:
        """An empty folder beside the path to write into.

        What a crashed save of the same group left there is removed.
        """
        with _refusing(self.path):
            return _empty(self._temporary)

    def discard(self) -> None:
        """Forget what :meth:`begin` gave; nothing of it stays."""
        _discard(self._temporary)

    def commit(self) -> Path:
        """Make the written folder the newest version and point the path at it; older ones than the
        last two go.

        Raises as :meth:`check` does; no version is left then.
        """
        self.check()  # long ago since the first time: the write took a while
        version = self._claim_version()
        try:
            with _refusing(self.path):
                link = self._temporary.with_name(f"{self._temporary.name}.link")
                link.unlink(missing_ok=True)
                link.symlink_to(version.name)
                replace_folder(link, self.path, _remove_replaced)
        except BaseException:
            if not (self.path.is_symlink() and os.readlink(self.path) == version.name):
                _discard(version)
            raise
        for _, old in self._versions()[:-KEPT_VERSIONS]:
            _remove_export(old)
        return version

    def _claim_version(self) -> Path:
        number = max((known for known, _ in self._versions()), default=0)
        while True:
            number += 1
            version = self.path.with_name(f".{self.path.name}.v{number}")
            try:
                os.rename(self._temporary, version)
                return version
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise

    def _versions(self) -> list[tuple[int, Path]]:
        found = []
        for sibling in self.path.parent.iterdir():
            match = self._pattern.fullmatch(sibling.name)
            if match is not None:
                found.append((int(match[1]), sibling))
        return sorted(found)


class PlainPath:
    """A folder that gets its name when it is complete; one of ours with that name is replaced in
    one step."""

    def __init__(self, path: Path, identifier: str) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.new-{identifier}")

    def check(self) -> None:
        """Raises ``PATH_REFUSED`` where something lies that no export of ours put there. Before any
        collective."""
        with _refusing(self.path):
            if os.path.lexists(self.path):
                check_replaceable(self.path)

    def begin(self) -> Path:
        """See :meth:`VersionedPath.begin`."""
        with _refusing(self.path):
            return _empty(self._temporary)

    def discard(self) -> None:
        """See :meth:`VersionedPath.discard`."""
        _discard(self._temporary)

    def commit(self) -> Path:
        """Publish what was written; raises as :meth:`check` does."""
        self.check()
        replace_folder(self._temporary, self.path, _remove_replaced)
        return self.path


def check_replaceable(path: Path) -> None:
    """Raises ``PATH_REFUSED`` unless ``path`` is an empty folder, or a Hugging Face folder that we
    wrote and no more."""
    if path.is_symlink() or not path.is_dir():
        raise _refused(path, "is no folder")
    if not any(path.iterdir()):
        return
    if (path / MANIFEST).exists():
        raise _refused(path, "holds a sharded checkpoint")
    record = _export(path)
    if record is None:
        raise _refused(path, "holds files that this service did not write")
    if others := unlisted(path, [*_file_names(record), EXPORT]):
        raise _refused(path, f"holds more than the model to be replaced ({first_few(others)})")


def _refused(path: Path, why: str) -> ServiceError:
    return ServiceError(
        "PATH_REFUSED",
        f"{path} {why}; choose another path, or remove it yourself",
        key="local_path",
    )


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """A place that the file system does not allow is the caller's error: ``PATH_REFUSED``."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SUCH_PLACE:
            raise _refused(path, f"cannot be made: {error.strerror}") from None
        raise


def _export(path: Path) -> Export | None:
    """None where there is none that can be read."""
    try:
        return read_export(path)
    except ServiceError:
        return None


def _file_names(record: Export) -> list[str]:
    return [entry.name for entry in record.files]


def _remove_export(folder: Path) -> None:
    """Delete what an export of ours consists of, and the folder if nothing of others is in it."""
    record = _export(folder)
    if record is not None:
        remove_listed(folder, _file_names(record), EXPORT)
    if os.path.lexists(folder):
        _log.warning("version.kept path=%s reason=others put something into it", folder)


def _remove_replaced(old: Path) -> None:
    """``old``, a link or a folder, was at the path until now.

    What others put into it in the very last moment is kept under a name that no later save takes.
    """
    if old.is_symlink():
        old.unlink()
        return
    _remove_export(old)
    with contextlib.suppress(OSError):
        old.rmdir()
    if os.path.lexists(old):
        os.rename(old, old.with_name(f"{old.name}.kept-{time.time_ns()}"))


def _empty(folder: Path) -> Path:
    remove_folder(folder)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise no_space(error, folder) from error
    return folder


def _discard(folder: Path) -> None:
    """As far as that goes: why it is discarded matters more."""
    try:
        remove_folder(folder)
    except OSError as error:
        _log.warning("leftover.kept path=%s reason=%s", folder, error.strerror)
