"""What the gateway reads from the environment, once, in ``__main__``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

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
    redis_url: str = field(default="redis://127.0.0.1:6379/0", repr=False)
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
        """Raises ValueError naming the variable that does not fit."""
        data = Path(os.environ.get("NEXRL_DATA") or "data").absolute()
        return cls(
            data=data,
            payloads=os.environ.get("NEXRL_PAYLOADS") or f"file://{data}/.nexrl/payloads",
            redis_url=os.environ.get("NEXRL_REDIS_URL") or "redis://127.0.0.1:6379/0",
            checkpoint_roots=_folders("NEXRL_CHECKPOINT_ROOTS"),
            model_roots=_folders("NEXRL_MODEL_ROOTS"),
            fsync=os.environ.get("NEXRL_FSYNC", "0") == "1",
            host=os.environ.get("NEXRL_HOST") or "127.0.0.1",
            port=_integer("NEXRL_PORT", 8000, 0),
            wait_limit_s=_integer("NEXRL_WAIT_LIMIT_S", 600, 1),
            max_body_bytes=_integer("NEXRL_MAX_BODY_BYTES", 4 * GIB, 1),
            max_connections=_integer("NEXRL_MAX_CONNECTIONS", 2000, 1),
            allowed_hosts=_hosts("NEXRL_ALLOWED_HOSTS"),
            result_kept_s=_integer("NEXRL_RESULT_KEPT_S", 300, 1),
            upload_kept_s=_integer("NEXRL_UPLOAD_KEPT_S", 600, 1),
            jobs_kept=_integer("NEXRL_JOBS_KEPT", 10_000, 0),
            jobs_kept_s=_integer("NEXRL_JOBS_KEPT_S", 600, 1),
        )

    @property
    def own_folder(self) -> Path:
        """The stack's own files, which no request may name."""
        return self.data / ".nexrl"

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the gateway."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


def _folders(name: str) -> tuple[Path, ...]:
    return tuple(
        Path(part).absolute() for part in os.environ.get(name, "").split(os.pathsep) if part
    )


def _hosts(name: str) -> tuple[str, ...]:
    hosts = tuple(
        part.strip("[]").lower() for part in re.split(r"[\s,]+", os.environ.get(name, "")) if part
    )
    for host in hosts:
        if not re.fullmatch(r"\*|(\*\.)?[a-z0-9_.:-]+", host) or re.fullmatch(r"[^:]*:[^:]*", host):
            raise ValueError(
                f"{name} lists host names or addresses without ports, and not {host!r}"
            )
    return hosts


def _integer(name: str, default: int, least: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {text!r}")
    return int(text)
