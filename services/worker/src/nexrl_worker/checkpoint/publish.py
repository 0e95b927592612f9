"""Gives a finished Hugging Face folder its name:

A link to the newest version (weight sync), or a folder of its own. Rank 0 only; local.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from nexrl_contract.durable import remove_folder, replace_folder
from nexrl_contract.errors import ServiceError
from nexrl_contract.manifest import EXPORT, MANIFEST

from nexrl_worker.checkpoint.tensor_file import no_space

KEPT_VERSIONS = 2


class VersionedPath:
    """A path that is a link to one of its sibling folders ``.{name}.v{n}``, swapped by rename: the weight-sync folder.

    A reader that resolves the link once keeps its version until two newer ones are there.
    """

    def __init__(self, path: Path, identifier: str) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.new-{identifier}")
        self._pattern = re.compile(rf"\.{re.escape(path.name)}\.v(\d+)")

    def check(self) -> None:
        """Raises ``PATH_REFUSED`` where something lies that we did not write for weight sync. Before any collective."""
        if self.path.is_symlink():
            target = self.path.parent / os.readlink(self.path)
            if target.parent != self.path.parent or self._pattern.fullmatch(target.name) is None:
                raise _refused(self.path, "is a link that this service did not make")
        elif os.path.lexists(self.path):
            check_replaceable(self.path)

    def begin(self) -> Path:
        """An empty folder beside the path to write into.

        What a crashed save of the same group left there is removed.
        """
        return _empty(self._temporary)

    def discard(self) -> None:
        """Forget what :meth:`begin` gave; nothing of it stays."""
        remove_folder(self._temporary)

    def commit(self) -> Path:
        """Make the written folder the newest version and point the path at it; older ones than the last two go."""
        version = self._claim_version()
        link = self._temporary.with_name(f"{self._temporary.name}.link")
        link.unlink(missing_ok=True)
        link.symlink_to(version.name)
        if not self.path.is_symlink():
            self.check()  # long ago since the first time: the write took a while
        replace_folder(link, self.path)
        for _, old in self._versions()[:-KEPT_VERSIONS]:
            remove_folder(old)
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
    """A folder that gets its name when it is complete; one of ours with that name is replaced in one step."""

    def __init__(self, path: Path, identifier: str) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.new-{identifier}")

    def check(self) -> None:
        """Raises ``PATH_REFUSED`` where something lies that no export of ours put there. Before any collective."""
        if os.path.lexists(self.path):
            check_replaceable(self.path)

    def begin(self) -> Path:
        """See :meth:`VersionedPath.begin`."""
        return _empty(self._temporary)

    def discard(self) -> None:
        """See :meth:`VersionedPath.discard`."""
        remove_folder(self._temporary)

    def commit(self) -> Path:
        """Publish what was written."""
        replace_folder(self._temporary, self.path)
        return self.path


def check_replaceable(path: Path) -> None:
    """Raises ``PATH_REFUSED`` unless ``path`` is an empty folder or a Hugging Face folder that we wrote."""
    if path.is_symlink() or not path.is_dir():
        raise _refused(path, "is no folder")
    if not any(path.iterdir()):
        return
    if (path / MANIFEST).exists():
        raise _refused(path, "holds a sharded checkpoint")
    if not (path / EXPORT).exists():
        raise _refused(path, "holds files that this service did not write")


def _refused(path: Path, why: str) -> ServiceError:
    return ServiceError("PATH_REFUSED", f"{path} {why}; choose another path, or remove it yourself", key="local_path")


def _empty(folder: Path) -> Path:
    remove_folder(folder)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise no_space(error, folder) from error
    return folder
