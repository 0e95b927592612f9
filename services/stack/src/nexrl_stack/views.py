"""What the read-only commands show: tables of what runs, waits and is published, and rank logs."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from nexrl_host.processes import older_logs
from nexrl_storage.manifest import Manifest, Published
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

_FOLLOW_S = 0.25
_LOG = re.compile(r"rank(\d+)\.log")
_PROSE = ("why", "cause", "path")
_STATE_STYLES = {
    "ready": "green",
    "healthy": "green",
    "finished": "green",
    "running": "cyan",
    "up": "cyan",
    "queued": "yellow",
    "placing": "yellow",
    "starting": "yellow",
    "degraded": "red",
    "down": "red",
    "failed": "red",
    "cancelled": "dim",
    "rolled_back": "magenta",
}


def status_view(status: dict[str, Any]) -> RenderableType:
    """The answer of ``fetch_status`` as lines and tables."""
    slots = status.get("slots") or {}
    lines = [
        f"[bold]{escape(status['url'])}[/bold]  {_state(status.get('status'))}",
        (
            f"Redis: {_text(status.get('redis'))}   payload store: "
            f"{_text(status.get('payload_store'))}"
        ),
        *(f"  [red]-[/red] {escape(reason)}" for reason in status.get("reasons") or ()),
        f"slots: {_text(slots.get('free'))} of {_text(slots.get('total'))} free",
        (
            f"agents: {_names(status.get('agents'))}   checkpointers: "
            f"{_names(status.get('checkpointers'))}"
        ),
    ]
    if not status["groups"]:
        return "\n".join([*lines, "no worker groups"])
    table = _table(
        "identifier",
        "state",
        "role",
        "world size",
        "epoch",
        "running",
        "queued",
        "heartbeat",
        "cause",
    )
    for group in status["groups"]:
        running = group["running"]
        table.add_row(
            _text(group["identifier"]),
            _state(group.get("state")),
            _text(group.get("role")),
            _text(group.get("world_size")),
            _text(group.get("epoch")),
            _text(running["operation"]) if running else "-",
            _text(group["queued"]),
            _ago(group.get("last_heartbeat")),
            _text(group.get("cause")),
        )
    return Group("\n".join(lines), table)


def jobs_view(jobs: list[dict[str, Any]]) -> RenderableType:
    """Job views of the gateway, newest first."""
    if not jobs:
        return "no jobs"
    table = _table("job", "operation", "identifier", "state", "submitted", "queued", "ran", "why")
    for job in jobs:
        error = job.get("error") or {}
        why = f"{error.get('code')}: {error.get('message')}" if error else job.get("waits_for")
        started, finished = job.get("started_at"), job.get("finished_at")
        table.add_row(
            _text(job["id"]),
            _text(job["operation"]),
            _text(job["identifier"]),
            _state(job["state"]),
            _ago(job.get("created_at")),
            _span(job.get("created_at"), started or finished),
            _span(started, finished) if started else "-",
            _text(why),
        )
    return table


def checkpoints_view(found: list[Published]) -> RenderableType:
    """Published checkpoints, oldest first."""
    if not found:
        return "no published checkpoints"
    table = _table("path", "kind", "identifier", "step", "world size", "size", "written")
    for item in found:
        checkpoint = item.checkpoint
        sharded = checkpoint if isinstance(checkpoint, Manifest) else None
        table.add_row(
            escape(item.path),
            f"{checkpoint.kind}{', weights only' if sharded and sharded.weight_only else ''}",
            _text(checkpoint.identifier),
            str(checkpoint.step),
            str(sharded.world_size) if sharded else "-",
            _size(checkpoint.nbytes),
            datetime.fromtimestamp(checkpoint.created).isoformat(sep=" ", timespec="seconds"),
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        # Prose gives way on a narrow terminal; an id must stay whole, since it is copied into the
        # next command.
        table.add_column(name, overflow="fold", no_wrap=name not in _PROSE)
    return table


def _text(value: object) -> str:
    return "-" if value is None else escape(str(value))


def _state(value: object) -> str:
    text = _text(value)
    style = _STATE_STYLES.get(text)
    return f"[{style}]{text}[/{style}]" if style else text


def _names(members: Iterable[Any] | None) -> str:
    names = [
        _text(member["name"] if isinstance(member, dict) else member) for member in members or ()
    ]
    return ", ".join(names) or "none"


def _ago(moment: float | None) -> str:
    return "-" if moment is None else f"{_duration(time.time() - moment)} ago"


def _span(start: float | None, end: float | None) -> str:
    return "-" if start is None else _duration((time.time() if end is None else end) - start)


def _duration(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _size(nbytes: int) -> str:
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


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
        time.sleep(_FOLLOW_S)


def rank_files(folder: Path) -> list[tuple[int, Path]]:
    """The log files of a group, by rank."""
    found = [
        (int(match[1]), path)
        for path in folder.glob("rank*.log")
        if (match := _LOG.fullmatch(path.name))
    ]
    return sorted(found)


@dataclass
class _Tail:
    """What of a growing file has not been read yet; one that was begun anew is read on in the copy
    of what it held."""

    path: Path
    position: int = 0
    rest: bytes = b""

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
