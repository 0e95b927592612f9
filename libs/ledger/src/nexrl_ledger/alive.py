"""A container's health check: ``python -m nexrl_ledger.alive agent|checkpointer`` exits 0 while one
of this host beats."""

from __future__ import annotations

import os
import socket
import sys

from nexrl_ledger.connection import connect
from nexrl_ledger.ledger import Ledger


def alive(ledger: Ledger, kind: str, host: str) -> bool:
    """Whether an ``agent`` or a ``checkpointer`` on ``host`` was heard in the last seconds; raises
    RedisError when Redis is away."""
    records = ledger.agents() if kind == "agent" else ledger.checkpointers()
    return any(record.host == host for record in records)


def main() -> None:
    """Entry point; says on standard error what is missing."""
    if len(sys.argv) != 2 or sys.argv[1] not in ("agent", "checkpointer"):
        sys.exit("usage: python -m nexrl_ledger.alive agent|checkpointer")
    client = connect(os.environ.get("NEXRL_REDIS_URL", "redis://127.0.0.1:6379/0"))
    host = socket.gethostname()
    if not alive(Ledger(client), sys.argv[1], host):
        sys.exit(f"no {sys.argv[1]} of {host} has been heard in the last seconds")


if __name__ == "__main__":
    main()
