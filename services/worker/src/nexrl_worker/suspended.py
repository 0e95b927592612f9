"""The state of a group that was stopped cleanly: how many operations it contains. Readable without torch."""

from __future__ import annotations

import json
from pathlib import Path

SEQ_FILE = "suspended.json"


def suspended_seq(folder: Path) -> int:
    """The ``seq`` of the state in ``folder``, 0 where there is none."""
    try:
        return int(json.loads((folder / SEQ_FILE).read_text())["seq"])
    except FileNotFoundError:
        return 0
