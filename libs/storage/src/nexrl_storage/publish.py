"""Publishing: a folder is written under a hidden name beside its place and gets its name when it is
whole.

Two policies: a :class:`Replacement` takes the place of the checkpoint before it; :class:`Versions`
stay beside one another, and a link leads to the newest. Neither replaces or deletes what others
wrote, even where they write it at the very last moment.
"""

from __future__ import annotations

import contextlib
import logging
import os
import posixpath
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Generic

from nexrl_contract.errors import ServiceError

from nexrl_storage import at
from nexrl_storage.manifest import (
    AnyCheckpoint,
    Export,
    Manifest,
    file_names,
    read_record,
)
from nexrl_storage.protocol import Kind, Uri, first_few, join, place_of_the_caller, refused, sibling

KEPT_VERSIONS = 2
VERSION = re.compile(r"\.(.+)\.v(\d+)")
"""The name of a version: that of the link which leads to it, and its number."""
_log = logging.getLogger(__name__)


class Replacement(Generic[AnyCheckpoint]):
    """Gives ``path`` a new checkpoint of ``kind``, in one step, instead of the one that is there.

    ``token`` tells concurrent writers apart. With ``attempt``, several processes may have tried
    the same publishing: each one has a hidden folder of its own, and what others put into the
    replaced checkpoint is put back. ``owner``: the group whose checkpoint alone may be replaced;
    None for any.
    """

    def __init__(
        self,
        path: Uri,
        token: str,
        kind: type[AnyCheckpoint],
        owner: str | None = None,
        attempt: int | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self.name = posixpath.basename(self.path)
        self._storage = at(path)
        self._kind: type[AnyCheckpoint] = kind
        self._owner = owner
        self._token = token
        self._attempts = attempt is not None
        self._prefix = f".{self.name}.new-{token}" + ("-" if self._attempts else "")
        self.new = sibling(path, self._prefix + (str(attempt) if self._attempts else ""))
        """The hidden folder, to be filled before :meth:`commit`."""

    def check(self) -> None:
        """Raises ``PATH_REFUSED`` unless nothing lies at the path, an empty folder, or a checkpoint
        of the same kind and owner with nothing else in its folder."""
        with place_of_the_caller(self.path):
            there = self._storage.look(self.path)
            if there is None:
                return
            if there.kind != "folder":
                raise refused(self.path, f"is no folder but a {there.kind}")
            if there.inside:
                self._check_record(self.record(self.path))

    def _check_record(self, record: AnyCheckpoint | None) -> None:
        if record is None:
            what = "checkpoint" if self._kind is Manifest else "model"
            raise refused(self.path, f"holds something that is no {what} of this service's saves")
        if self._owner is not None and record.identifier != self._owner:
            why, way_out = f"holds a checkpoint of group {record.identifier!r}", "remove it"
            raise refused(self.path, why, f"{way_out} if nobody needs it")
        if others := others_in(self.path, file_names(record)):
            why = f"holds more than the checkpoint to be replaced ({first_few(others)})"
            raise refused(self.path, why, "move that elsewhere")

    def begin(self) -> Path:
        """Make the hidden folder, empty whatever a crashed attempt left there; where to write."""
        with place_of_the_caller(self.path):
            self._storage.remove(self.new, recursive=True)
            self._storage.make(self.new)
        return Path(self.new)

    def commit(self) -> None:
        """Publish the hidden folder; raises as :meth:`check` does."""
        self.check()  # long ago since the first time: others may have come meanwhile
        with place_of_the_caller(self.path):
            former = self._storage.move(self.new, self.path, replace=True)
        if former is not None:
            self._retire(former)

    def discard(self, *others: Uri) -> None:
        """Remove what this and earlier attempts left beside the path, and ``others``, as far as
        that goes."""
        for folder in [*self.leftovers(), *(os.fspath(other) for other in others)]:
            try:
                record = self.record(folder)
                if isinstance(record, Manifest) and record.job_id != self._token:
                    # What was here before: this or its removal was killed. Between the two renames
                    # of a storage that cannot swap nothing replaced it, and it goes back.
                    if self._storage.look(self.path) is None:
                        self._storage.move(folder, self.path)
                    else:
                        self._retire(folder)
                else:
                    self._storage.remove(folder, recursive=True)
            except OSError as error:
                _log.warning("leftover.kept path=%s reason=%s", folder, error.strerror)

    def leftovers(self) -> list[str]:
        """The hidden folders of all attempts."""
        if not self._attempts:
            return [self.new]
        try:
            parent = self._storage.look(sibling(self.path, ""))
        except OSError:
            return []
        names = parent.inside if parent is not None else ()
        return [sibling(self.path, name) for name in names if name.startswith(self._prefix)]

    def record(self, folder: Uri) -> AnyCheckpoint | None:
        """What a folder says that it is; None for another kind, or nothing that can be read."""
        try:
            record = read_record(folder)
        except (ServiceError, IsADirectoryError):
            return None
        return record if isinstance(record, self._kind) else None

    def _retire(self, former: str) -> None:
        """``former`` was at the path until now. What others put into it in the last moment goes
        back to its place, or stays under a name that no later save takes."""
        try:
            record = self.record(former)
            names = file_names(record) if record is not None else []
            if self._attempts:
                for name in others_in(former, names):
                    with contextlib.suppress(OSError):
                        self._storage.move(join(former, name), join(self.path, name))
            self._delete(former)
            if self._storage.look(former) is not None:
                kept = sibling(self.path, f".{self.name}.kept-{time.time_ns()}")
                self._storage.move(former, kept)
        except OSError as error:
            _log.warning("replaced.kept path=%s reason=%s", former, error.strerror)

    def _delete(self, folder: str) -> None:
        """A checkpoint of this kind, and its folder where nothing else is in it."""
        record = self.record(folder)
        remove_listed(folder, file_names(record) if record is not None else ())


class Versions(Replacement[Export]):
    """``path`` is a link to one of its siblings ``.{name}.v{n}``: the weight-sync folder.

    A reader that resolves the link once keeps its version until two newer ones are there. Links are
    a thing of local file systems: inference engines map the files.
    """

    def __init__(self, path: Uri, identifier: str) -> None:
        super().__init__(path, identifier, Export, owner=identifier)

    def check(self) -> None:
        """Raises ``PATH_REFUSED`` where something lies that this group did not write for weight
        sync."""
        with place_of_the_caller(self.path):
            there = self._storage.look(self.path)
        if there is None or there.kind != "link":
            super().check()
            return
        target = sibling(self.path, os.readlink(self.path))
        version = VERSION.fullmatch(posixpath.basename(target))
        here = posixpath.dirname(target) == posixpath.dirname(self.path)
        if not here or version is None or version[1] != self.name:
            raise refused(self.path, "is a link that this service did not make")
        record = self.record(self.path)
        if record is not None and record.identifier != self._owner:
            raise refused(self.path, f"holds the weights of group {record.identifier!r}")

    def commit(self) -> None:
        """Make the written folder the newest version and point the path at it; older ones than the
        last two go.

        Raises as :meth:`check` does; no version is left then.
        """
        self.check()  # long ago since the first time: the write took a while
        version = self._claim()
        link = f"{self.new}.link"
        try:
            with place_of_the_caller(self.path):
                self._storage.remove(link)
                os.symlink(version, link)
                former = self._storage.move(link, self.path, replace=True)
        except BaseException:
            if not (os.path.islink(self.path) and os.readlink(self.path) == version):
                self._storage.remove(sibling(self.path, version), recursive=True)
            raise
        if former is not None and os.path.islink(former):
            self._storage.remove(former)
        elif former is not None:
            self._retire(former)
        for number in self._numbers()[:-KEPT_VERSIONS]:
            self._delete(sibling(self.path, f".{self.name}.v{number}"))

    def _claim(self) -> str:
        """The hidden folder becomes a version: its name."""
        number = max(self._numbers(), default=0)
        while True:
            number += 1
            # Between the look at the numbers and the move another group may have taken this one.
            with contextlib.suppress(FileExistsError):
                self._storage.move(self.new, sibling(self.path, f".{self.name}.v{number}"))
                return f".{self.name}.v{number}"

    def _numbers(self) -> list[int]:
        parent = self._storage.look(sibling(self.path, ""))
        found = map(VERSION.fullmatch, parent.inside if parent is not None else ())
        return sorted(int(one[2]) for one in found if one is not None and one[1] == self.name)


def others_in(folder: Uri, names: Iterable[str]) -> list[str]:
    """What lies in ``folder`` besides the files ``names`` and the folders on the way to them:
    relative paths, sorted.

    A folder or a link that is not on the way stands for all that is in it.
    """
    ways, files = _ways(names), set(names)
    return sorted(
        name
        for name, kind in _entries(folder, ways)
        if name not in (ways if kind == "folder" else files)
    )


def remove_listed(folder: Uri, names: Sequence[str]) -> None:
    """Delete the files ``names``, the last of them last, and ``folder`` if it is empty then.

    Whatever others put there stays, and nothing is reached through a link. A killed removal can be
    repeated as long as the last file, which lists the others, is there.
    """
    storage, ways, found = at(folder), _ways(names), at(folder).look(folder)
    if found is None or found.kind != "folder":
        return
    there = dict(_entries(folder, ways))
    for name in names[:-1]:
        if there.get(name, "folder") != "folder":
            storage.remove(join(folder, name))
    # A folder that is not empty stays: others may put something there until the very last moment.
    for way in sorted(ways & there.keys(), reverse=True):
        if there[way] == "folder":
            with contextlib.suppress(OSError):
                storage.remove(join(folder, way))
    for name in names[-1:]:
        if there.get(name, "folder") != "folder":
            storage.remove(join(folder, name))
    with contextlib.suppress(OSError):
        storage.remove(folder)


def _ways(names: Iterable[str]) -> set[str]:
    """The folders that lead to ``names``."""
    return {str(way) for name in names for way in PurePosixPath(name).parents} - {"."}


def _entries(folder: Uri, ways: set[str], way: str = "") -> Iterator[tuple[str, Kind]]:
    """What lies in ``folder`` and in those of ``ways`` that are folders, by relative path."""
    there = at(folder).look(join(folder, way) if way else folder)
    for name, kind in there.inside.items() if there is not None else ():
        path = join(way, name)
        yield path, kind
        if kind == "folder" and path in ways:
            yield from _entries(folder, ways, path)
