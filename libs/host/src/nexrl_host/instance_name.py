"""A name that a replica finds again: ``python -m nexrl_host.instance_name VARIABLE PREFIX
COMMAND...``.

A group belongs to an agent by name, but a container gets a new host name each time it is made. So
each replica takes the first of ``PREFIX-1``, ``PREFIX-2``, ... that no other holds, puts it into
``VARIABLE`` and becomes ``COMMAND``. What holds a name is the lock on a file in the data folder:
the kernel frees it however the process ends.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import sys
from pathlib import Path


def take_name(folder: Path, prefix: str) -> tuple[str, int]:
    """``(name, descriptor)``; the name is held while the descriptor, or one inherited from it, is
    open."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        name = f"{prefix}-{number}"
        descriptor = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
        else:
            return name, descriptor
    raise AssertionError("unreachable")


def main() -> None:
    """Entry point; becomes the command, so that signals and the process list are the command's
    own."""
    if len(sys.argv) < 4:
        sys.exit("usage: python -m nexrl_host.instance_name VARIABLE PREFIX COMMAND...")
    variable, prefix, *command = sys.argv[1:]
    data = Path(os.environ.get("NEXRL_DATA", "data")).absolute()
    name, descriptor = take_name(data / ".nexrl" / "replicas", prefix)
    os.set_inheritable(descriptor, True)
    os.execvpe(command[0], command, {**os.environ, variable: name})


if __name__ == "__main__":
    main()
