"""What the gateway reads from the environment, once, in ``__main__``."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from nexrl_contract.names import DEFAULT_REDIS_URL

GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Settings:
    """``wait_limit_s`` bounds a synchronous answer, ``max_body_bytes`` a request's body.

    ``result_kept_s``: tensors of a result after their last delivery; ``upload_kept_s``: an upload
    after its last byte; ``jobs_kept``: records of ended jobs, the newest, and all of the last
    ``jobs_kept_s``. ``allowed_hosts`` are names that ``Host`` may have besides loopback and the
    address served; "*.suffix" and "*" too.
    """

    data: Path
    payloads: str = field(repr=False)
    redis_url: str = field(default=DEFAULT_REDIS_URL, repr=False)
    checkpoint_roots: tuple[Path, ...] = ()
    model_roots: tuple[Path, ...] = ()
    fsync: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    wait_limit_s: float = 600.0
    max_body_bytes: int = 4 * GIB
    max_connections: int = 2000
    allowed_hosts: tuple[str, ...] = ()
    result_kept_s: float = 300.0
    upload_kept_s: float = 600.0
    jobs_kept: int = 10_000
    jobs_kept_s: float = 600.0

    @classmethod
    def from_env(cls) -> Self:
        """A variable that is not set, or empty, leaves the default above. Raises ValueError naming
        the variable that does not fit."""
        data = Path(os.environ.get("NEXRL_DATA") or "data").absolute()
        given: dict[str, Any] = {
            name: read(variable)
            for name, read in _READERS.items()
            if os.environ.get(variable := f"NEXRL_{name.upper()}")
        }
        return cls(**{"data": data, "payloads": f"file://{data}/.nexrl/payloads", **given})

    @property
    def own_folder(self) -> Path:
        """The stack's own files, which no request may name."""
        return self.data / ".nexrl"

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the gateway."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


def _folders(name: str) -> tuple[Path, ...]:
    return tuple(Path(part).absolute() for part in os.environ[name].split(os.pathsep) if part)


def _hosts(name: str) -> tuple[str, ...]:
    parts = re.split(r"[\s,]+", os.environ[name])
    hosts = tuple(part.strip("[]").lower() for part in parts if part)
    for host in hosts:
        if not re.fullmatch(r"\*|(\*\.)?[a-z0-9_.:-]+", host) or re.fullmatch(r"[^:]*:[^:]*", host):
            message = f"{name} lists host names or addresses without ports, and not {host!r}"
            raise ValueError(message)
    return hosts


def _integer(least: int) -> Callable[[str], int]:
    def read(name: str) -> int:
        text = os.environ[name]
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise ValueError(f"{name} must be an integer of at least {least}, not {text!r}")
        return int(text)

    return read


_READERS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("payloads", "redis_url", "host"), os.environ.__getitem__),
    **dict.fromkeys(("checkpoint_roots", "model_roots"), _folders),
    **dict.fromkeys(("port", "jobs_kept"), _integer(0)),
    **dict.fromkeys(("wait_limit_s", "max_body_bytes", "max_connections"), _integer(1)),
    **dict.fromkeys(("result_kept_s", "upload_kept_s", "jobs_kept_s"), _integer(1)),
    "allowed_hosts": _hosts,
    "fsync": lambda name: os.environ[name] == "1",
}
"""How the variable of each field is read."""
