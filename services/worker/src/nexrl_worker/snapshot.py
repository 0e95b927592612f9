"""The state of a group that was stopped cleanly: which operations it contains. Readable without
torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from nexrl_worker.settings import GroupFolders

SNAPSHOT_FILE = "suspended.json"


class Snapshot(NamedTuple):
    """``seq`` operations are in the state. Incarnation ``epoch`` had ``dropped`` more: gradients
    that no step had used.

    ``lost`` are the jobs of such gradients, of this or an earlier stop, of which nobody has been
    told yet.
    """

    seq: int = 0
    dropped: int = 0
    epoch: int = 0
    lost: tuple[str, ...] = ()

    def accounts_for(self, seq: int, epoch: int) -> bool:
        """Whether a group that stood at ``seq`` operations in incarnation ``epoch`` lost no
        weights."""
        return seq <= self.seq + (self.dropped if epoch == self.epoch else 0)


def read_snapshot(folder: Path) -> Snapshot:
    """What the state in ``folder`` contains; nothing where there is none."""
    try:
        snapshot = Snapshot(**json.loads((folder / SNAPSHOT_FILE).read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return Snapshot()
    return snapshot._replace(lost=tuple(snapshot.lost))


def forget_snapshot(folders: GroupFolders) -> None:
    """Remove what a clean stop kept: it belongs to a group that is no more."""
    for folder in (folders.state, folders.new_state):
        shutil.rmtree(folder, ignore_errors=True)


def lost_operations(count: int) -> str:
    """How a cause says what went with a group's processes, and what to do."""
    return (
        f"{count} finished operations that changed the weights went with its processes (now "
        "rolled_back); destroy the group, initialise it again and load a checkpoint"
    )
