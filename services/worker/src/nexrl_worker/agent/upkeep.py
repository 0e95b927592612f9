"""What groups leave on the data folder of their agent, and for how long."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from nexrl_ledger import Ledger

LOGS_KEPT = 20
LOGS_KEPT_S = 7 * 24 * 3600.0
_GONE = ".gone-"  # no identifier begins so


def clear_staging(ledger: Ledger, data: Path) -> None:
    """Remove what saves that have ended left in staging: their ranks died before they could hand
    over."""
    for folder in (data / ".nexrl" / "staging").glob("*"):
        job = ledger.job(folder.name)
        if job is None or job.final:
            shutil.rmtree(folder, ignore_errors=True)


def clear_destroyed(ledger: Ledger, data: Path, running: Collection[str]) -> None:
    """Remove what destroyed groups left: their state at once, logs beyond the last ``LOGS_KEPT``
    groups or after a week.

    A state is removed only where Redis itself says that its group was destroyed, not where it knows
    nothing.
    """
    for folder in (data / ".nexrl" / "groups").glob("*"):
        group = None if folder.name in running else ledger.groups.get(folder.name)
        if folder.name.startswith(_GONE) or (group is not None and group.state == "destroyed"):
            _remove_aside(folder)
    logs = list((data / ".nexrl" / "logs" / "groups").glob("*"))
    # Race: a group may be made meanwhile. Read after the folders, the living contain every group
    # whose folder was seen.
    living = {*ledger.groups.identifiers(), *running}
    ended = [(_last_written(folder), folder) for folder in logs if folder.name not in living]
    for number, (written, folder) in enumerate(sorted(ended, reverse=True)):
        if number >= LOGS_KEPT or time.time() - written > LOGS_KEPT_S:
            _remove_aside(folder)


def _remove_aside(folder: Path) -> None:
    """Race: another agent may be given the next group of that name while we remove. The name is
    free at once, since the folder is renamed first."""
    aside = folder if folder.name.startswith(_GONE) else folder.with_name(_GONE + folder.name)
    with suppress(OSError):
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _last_written(folder: Path) -> float:
    """Seconds since the epoch; 0 for what is being removed."""
    if not folder.name.startswith(_GONE):
        with suppress(OSError):
            return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    return 0.0
