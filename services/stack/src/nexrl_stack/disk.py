"""Whether the disk of the data folder has room for the stack's own records."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

_NEEDED_MB = 32
_MB = 1024**2


def lack_of_room(data: Path) -> Callable[[], str | None]:
    """A look at the disk of ``data``: what to do about it where it is full, None while there is room."""

    def look() -> str | None:
        try:
            missing = _NEEDED_MB - shutil.disk_usage(data).free / _MB
        except OSError:  # a folder that is gone is no full one
            return None
        return f"the disk of {data} is full: free {math.ceil(missing)} MB" if missing > 0 else None

    return look
