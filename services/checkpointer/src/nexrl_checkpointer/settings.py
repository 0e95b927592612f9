"""What the checkpointer reads from the environment, once."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True, slots=True)
class Settings:
    """``data`` is the absolute data folder; staging lies below it. ``name`` is unique among living
    checkpointers."""

    redis_url: str
    data: Path
    name: str

    @classmethod
    def from_env(cls) -> Self:
        """Every variable has a default."""
        return cls(
            redis_url=os.environ.get("NEXRL_REDIS_URL", "redis://127.0.0.1:6379/0"),
            data=Path(os.environ.get("NEXRL_DATA", "data")).absolute(),
            name=os.environ.get("NEXRL_CHECKPOINTER_NAME")
            or f"{socket.gethostname()}-{os.getpid()}",
        )

    @property
    def staging(self) -> Path:
        """The ranks of a save write into a folder of its own in here."""
        return self.data / ".nexrl" / "staging"
