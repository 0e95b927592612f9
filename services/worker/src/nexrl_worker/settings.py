"""What the agent and its ranks read from the environment, once, at their entry points."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from nexrl_contract.names import DEFAULT_REDIS_URL
from nexrl_host.machine import CPU_SLOTS, visible_gpus
from nexrl_host.processes import log_limit

from nexrl_worker.channel import Channel

_DEFAULT_STOP_LIMIT_S = 50  # within the stop_grace_period of docker-compose.yml


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """``identifier`` keeps the agent for one fixed group; ``gpus`` is empty on CPU.

    ``stop_limit_s``: how long its groups may take, when it is stopped, to end their operation and
    keep their state.
    """

    name: str
    redis_url: str
    data: Path
    payloads: str
    slots: int
    gpus: tuple[str, ...]
    identifier: str | None
    fsync: bool
    stop_limit_s: int
    log_bytes: int

    @classmethod
    def from_env(cls) -> Self:
        """Raises ValueError naming the variable that does not fit."""
        data = Path(os.environ.get("NEXRL_DATA", "data")).absolute()
        gpus = visible_gpus()
        fixed = os.environ.get("NEXRL_IDENTIFIER") or None
        world_size = _integer("NEXRL_WORLD_SIZE", 1) if fixed else None
        slots = world_size or _integer("NEXRL_SLOTS", len(gpus) or CPU_SLOTS)
        if gpus and slots > len(gpus):
            raise ValueError(
                f"{slots} slots were asked for (NEXRL_SLOTS or NEXRL_WORLD_SIZE), but there are "
                f"{len(gpus)} GPUs"
            )
        return cls(
            name=os.environ.get("NEXRL_AGENT_NAME") or socket.gethostname(),
            redis_url=os.environ.get("NEXRL_REDIS_URL", DEFAULT_REDIS_URL),
            data=data,
            payloads=os.environ.get("NEXRL_PAYLOADS") or f"file://{data}/.nexrl/payloads",
            slots=slots,
            gpus=gpus,
            identifier=fixed,
            fsync=os.environ.get("NEXRL_FSYNC", "0") == "1",
            stop_limit_s=_integer("NEXRL_STOP_LIMIT_S", _DEFAULT_STOP_LIMIT_S),
            log_bytes=log_limit(),
        )


@dataclass(frozen=True, slots=True)
class RankSettings:
    """One rank of one incarnation of a group.

    ``restore`` builds the model at once and loads the suspended state, if any; ``seq`` operations
    are in that state.
    """

    identifier: str
    epoch: int
    role: str
    config: dict[str, Any]
    rank: int
    world_size: int
    redis_url: str
    data: Path
    payloads: str
    fsync: bool
    restore: bool
    seq: int
    agent_pid: int = 0

    @classmethod
    def from_env(cls) -> Self:
        """The agent writes ``NEXRL_GROUP``; torchrun adds ``RANK`` and ``WORLD_SIZE``."""
        group = json.loads(os.environ["NEXRL_GROUP"])
        return cls(
            **{**group, "data": Path(group["data"])},
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )


@dataclass(frozen=True, slots=True)
class GroupFolders:
    """Where a group's own files lie below the data folder."""

    data: Path
    identifier: str

    @property
    def channel(self) -> Channel:
        """Between the agent and the ranks of the present incarnation."""
        return Channel(self.state.with_name("run"))

    @property
    def state(self) -> Path:
        """The state of a group that was stopped cleanly."""
        return self.data / ".nexrl" / "groups" / self.identifier / "state"

    @property
    def new_state(self) -> Path:
        """That state while it is being written."""
        return self.state.with_name("state.new")

    @property
    def logs(self) -> Path:
        """One log a rank."""
        return self.data / ".nexrl" / "logs" / "groups" / self.identifier


def _integer(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{name} must be a positive integer, not {text!r}")
    return int(text)
