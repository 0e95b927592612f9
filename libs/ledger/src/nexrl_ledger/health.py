"""A container's health check: ``python -m nexrl_ledger.health agent|checkpointer REDIS_URL`` exits
0 while one of this host is heard."""

from __future__ import annotations

import socket
import sys

from nexrl_ledger.connection import connect
from nexrl_ledger.ledger import Ledger


def main() -> None:
    """Entry point; says on standard error what is missing."""
    match sys.argv[1:]:
        case ["agent" | "checkpointer" as kind, redis_url]:
            ledger = Ledger(connect(redis_url))
        case _:
            sys.exit("usage: python -m nexrl_ledger.health agent|checkpointer REDIS_URL")
    processes = ledger.agents if kind == "agent" else ledger.checkpointers
    if not any(record.host == socket.gethostname() for record in processes.heard()):
        sys.exit(f"no {kind} of {socket.gethostname()} has been heard in the last seconds")


if __name__ == "__main__":
    main()
