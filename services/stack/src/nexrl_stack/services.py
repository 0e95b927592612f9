"""What each process of the stack is: its name, command line, environment, and how long its clean
stop may take."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nexrl_host.machine import CPU_SLOTS, visible_gpus

STOP_LIMIT_S = 30 * 60
"""How long a stop waits for running operations to end and for groups to keep their state."""
_AGENT_GRACE_S = STOP_LIMIT_S + 60.0
_CHECKPOINTER_GRACE_S = 60.0
_GATEWAY_GRACE_S = 15.0


@dataclass(frozen=True, slots=True)
class Service:
    """One process; ``env`` is added to ours, ``grace_s`` is how long it may take to stop after
    SIGTERM.

    ``hopeless`` tells from what a dead process has logged why another start would end alike, and
    what to do; None where it may not.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    grace_s: float
    hopeless: Callable[[str], str | None] = lambda log: None


@dataclass(frozen=True, slots=True)
class StackSettings:
    """What ``nexrl up`` was asked for; folders are absolute, ``redis_url`` None means the embedded
    server."""

    host: str
    port: int
    slots: int
    checkpointers: int
    data: Path
    redis_url: str | None
    payloads: str | None
    checkpoint_roots: tuple[Path, ...]
    model_roots: tuple[Path, ...]

    @property
    def own_folder(self) -> Path:
        """Where the stack keeps its own files."""
        return self.data / ".nexrl"

    @property
    def agent_name(self) -> str:
        """The agent's stable name. A laptop's host name may change between two runs; only a shared
        Redis needs it."""
        return "local" if self.redis_url is None else socket.gethostname()

    @property
    def checkpointer_names(self) -> tuple[str, ...]:
        """One name per checkpointer, unlike on every host of a shared Redis."""
        return tuple(f"{self.agent_name}-{number}" for number in range(1, self.checkpointers + 1))


def stack_services(settings: StackSettings, redis_url: str) -> list[Service]:
    """Gateway, checkpointers and agent in the order of starting; stopping is the reverse."""
    shared = _shared_environment(settings, redis_url)
    gateway = {**shared, "NEXRL_HOST": settings.host, "NEXRL_PORT": str(settings.port)}
    agent = {
        **shared,
        "NEXRL_SLOTS": str(settings.slots),
        "NEXRL_AGENT_NAME": settings.agent_name,
        "NEXRL_STOP_LIMIT_S": str(STOP_LIMIT_S),
    }
    return [
        _python("gateway", "nexrl_gateway", gateway, _GATEWAY_GRACE_S),
        *(
            _python(
                f"checkpointer-{number}",
                "nexrl_checkpointer",
                {**shared, "NEXRL_CHECKPOINTER_NAME": name},
                _CHECKPOINTER_GRACE_S,
            )
            for number, name in enumerate(settings.checkpointer_names, start=1)
        ),
        _python("agent", "nexrl_worker.agent", agent, _AGENT_GRACE_S),
    ]


def default_slots() -> int:
    """As many as an agent offers when it is not told."""
    return len(visible_gpus()) or CPU_SLOTS


def _python(name: str, module: str, env: Mapping[str, str], grace_s: float) -> Service:
    return Service(name, (sys.executable, "-m", module), env, grace_s)


def _shared_environment(settings: StackSettings, redis_url: str) -> dict[str, str]:
    env = {
        "NEXRL_REDIS_URL": redis_url,
        "NEXRL_DATA": str(settings.data),
        "NEXRL_CHECKPOINT_ROOTS": os.pathsep.join(map(str, settings.checkpoint_roots)),
        "PYTHONUNBUFFERED": "1",
    }
    if settings.payloads is not None:
        env["NEXRL_PAYLOADS"] = settings.payloads
    if settings.model_roots:
        env["NEXRL_MODEL_ROOTS"] = os.pathsep.join(map(str, settings.model_roots))
    return env
