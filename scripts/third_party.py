"""Requirements of the given ``pyproject.toml`` files without those on one another, one a line.

An image installs them in a layer of its own, which stays valid while only our code changes.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path


def third_party(paths: list[str]) -> list[str]:
    """Sorted requirement lines; a requirement on a project among ``paths`` is left out."""
    projects = [tomllib.loads(Path(path).read_text(encoding="utf-8"))["project"] for path in paths]
    own = {_normal(project["name"]) for project in projects}
    wanted = {line for project in projects for line in project.get("dependencies", [])}
    return sorted(line for line in wanted if _normal(line) not in own)


def _normal(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]).lower()


if __name__ == "__main__":
    sys.stdout.write("\n".join(third_party(sys.argv[1:])) + "\n")
