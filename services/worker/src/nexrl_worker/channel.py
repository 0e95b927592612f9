"""What the agent and the ranks of one incarnation of a group tell each other."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from nexrl_storage import at


class RankFailure(NamedTuple):
    """What ended a rank, in its own words; ``at`` is the time in seconds since the epoch."""

    message: str
    at: float


class Channel:
    """Messages by name, each told once and heard by whoever looks, then or later.

    A message is a file: written aside and renamed, so it is there whole or not at all. No other
    module knows that; agents and ranks on several hosts need another channel with these methods.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def clear(self) -> None:
        """The agent, before a rank starts: nothing has been told. Raises OSError."""
        at(self._folder).remove(self._folder, recursive=True)
        self._folder.mkdir(parents=True)

    # --- the agent tells the ranks ---

    def ask_to_stop(self) -> None:
        """End after the current operation and keep the state. Raises OSError, on a full disk."""
        self._path("stop").touch()  # no content: a full disk takes a name, and no block

    @property
    def stop_asked(self) -> bool:
        """Whether the agent asked the ranks to stop."""
        return self._path("stop").exists()

    # --- the ranks tell the agent ---

    def tell_destroyed(self, job_id: str) -> None:
        """Rank 0, before any rank leaves: this ``destroy`` job ends the group."""
        self._tell("destroyed", job_id)

    @property
    def destroyed_by(self) -> str | None:
        """The ``destroy`` job that ended the group."""
        job_id: str | None = self._heard("destroyed")
        return job_id

    def tell_pid(self, rank: int) -> None:
        """A rank, first of all: this process is it."""
        self._tell(_pid(rank), os.getpid())

    def pid(self, rank: int) -> int | None:
        """The process of a rank, None until it has told."""
        pid: int | None = self._heard(_pid(rank))
        return pid

    def tell_failure(self, rank: int, message: str, trace: str) -> None:
        """A rank, before it leaves the others in the middle of something."""
        self._tell(_failure(rank), {"message": message, "trace": trace, "at": time.time()})

    def failures(self, world_size: int) -> dict[int, RankFailure]:
        """What ranks said of their ends, by rank."""
        told = {rank: self._heard(_failure(rank)) for rank in range(world_size)}
        return {
            rank: RankFailure(words["message"], words["at"])
            for rank, words in told.items()
            if words is not None
        }

    # --- the check of the models tells the agent ---

    def tell_refused(self, error: dict[str, Any]) -> None:
        """No rank can run the group's models; ``error`` is a ServiceError's body."""
        self._tell("refused", error)

    @property
    def refusal(self) -> dict[str, Any] | None:
        """That error, None where there is none (yet)."""
        error: dict[str, Any] | None = self._heard("refused")
        return error

    def _tell(self, name: str, message: Any) -> None:
        aside = self._folder / f"{name}.new"
        aside.write_text(json.dumps(message))
        aside.rename(self._path(name))

    def _heard(self, name: str) -> Any:
        try:
            return json.loads(self._path(name).read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _path(self, name: str) -> Path:
        return self._folder / name


def _pid(rank: int) -> str:
    return f"rank{rank}.pid"


def _failure(rank: int) -> str:
    return f"rank{rank}.error"
