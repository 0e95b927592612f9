"""The logs of a group's ranks, line by line, each with the rank it came from."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nexrl_host.processes import older_logs

_POLL_S = 0.25
_FILE = re.compile(r"rank(\d+)\.log")


def rank_lines(folder: Path, *, follow: bool) -> Iterator[str]:
    """``[rank] line`` for every line there is, rank by rank; with ``follow`` then each new line,
    forever."""
    tails: dict[Path, _Tail] = {}
    while True:
        for rank, path in rank_files(folder):
            if path not in tails:
                for older in older_logs(path):
                    if older.exists():
                        yield from _numbered(rank, _Tail(older).new_lines(unfinished=True))
            yield from _numbered(
                rank, tails.setdefault(path, _Tail(path)).new_lines(unfinished=not follow)
            )
        if not follow:
            return
        time.sleep(_POLL_S)


def rank_files(folder: Path) -> list[tuple[int, Path]]:
    """The log files of a group, by rank."""
    found = [
        (int(match[1]), path)
        for path in folder.glob("rank*.log")
        if (match := _FILE.fullmatch(path.name))
    ]
    return sorted(found)


@dataclass
class _Tail:
    """What of a growing file has not been read yet; one that was begun anew is read on in the copy
    of what it held."""

    path: Path
    position: int = 0
    rest: bytes = field(default=b"")

    def new_lines(self, *, unfinished: bool) -> list[str]:
        """Lines that ended since the last call; ``unfinished`` also gives a last one without its
        end."""
        with self.path.open("rb") as file:
            text = self.rest
            if file.seek(0, 2) < self.position:
                text += self._left_behind()
                self.position = 0
            file.seek(self.position)
            text += file.read()
            self.position = file.tell()
        *lines, self.rest = text.split(b"\n")
        if unfinished and self.rest:
            lines.append(self.rest)
        return [line.decode(errors="replace").rstrip("\r") for line in lines]

    def _left_behind(self) -> bytes:
        try:
            with older_logs(self.path)[-1].open("rb") as copy:
                copy.seek(self.position)
                return copy.read()
        except FileNotFoundError:
            return b""


def _numbered(rank: int, lines: list[str]) -> list[str]:
    return [f"[{rank}] {line}" for line in lines]
