"""Asks for ``/health`` every 20 ms until its input ends, then says how long the answers took."""

from __future__ import annotations

import json
import select
import sys
import time

import requests

EVERY_S = 0.02


def main(url: str) -> None:
    """One JSON list of milliseconds on standard output."""
    session = requests.Session()
    session.trust_env = False
    taken: list[float] = []
    session.get(f"{url}/health", timeout=30)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while not select.select([sys.stdin], [], [], EVERY_S)[0]:
        start = time.monotonic()
        session.get(f"{url}/health", timeout=30).raise_for_status()
        taken.append((time.monotonic() - start) * 1000)
    sys.stdout.write(f"{json.dumps(taken)}\n")


if __name__ == "__main__":
    main(sys.argv[1])
