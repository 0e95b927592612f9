"""What containers need of the ledger: a name that survives them, and a health check that is
true."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from nexrl_contract.records import ProcessRecord
from nexrl_ledger import Ledger, connect

SAY_NAME = "import os, sys; print(os.environ['NAME'], flush=True); sys.stdin.read()"


def replica(data: Path) -> tuple[subprocess.Popen[str], str]:
    """A process that became SAY_NAME under a name it took, and that name; it ends when its input is
    closed."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "nexrl_host.instance_name",
            "NAME",
            "worker",
            sys.executable,
            "-c",
            SAY_NAME,
        ],
        env={**os.environ, "NEXRL_DATA": str(data)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def health_check(kind: str, redis_url: str) -> int:
    command = [sys.executable, "-m", "nexrl_ledger.health", kind, redis_url]
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode


def test_replicas_take_different_names_and_a_killed_ones_name_is_taken_again(
    tmp_path: Path,
) -> None:
    """The name is held through exec and freed by death, so a successor finds what belonged to
    it."""
    first, first_name = replica(tmp_path)
    second, second_name = replica(tmp_path)
    first.kill()
    first.communicate()
    third, third_name = replica(tmp_path)
    for process in (second, third):
        process.communicate()

    assert (first_name, second_name, third_name) == ("worker-1", "worker-2", "worker-1")


def test_the_health_check_follows_the_heartbeat_of_its_own_kind_and_host(redis_url: str) -> None:
    """It fails without a record, with another host's, and with one of the other kind."""
    ledger = Ledger(connect(redis_url))
    ledger.agents.beat(ProcessRecord(name="elsewhere", host="elsewhere", heartbeat=time.time()))
    assert health_check("agent", redis_url) == 1

    ledger.agents.beat(ProcessRecord(name="here", host=socket.gethostname(), heartbeat=time.time()))
    assert health_check("agent", redis_url) == 0
    assert health_check("checkpointer", redis_url) == 1

    ledger.agents.sign_off("here")
    assert health_check("agent", redis_url) == 1
    ledger.client.close()


def test_the_health_check_fails_while_redis_is_away() -> None:
    """Nothing listens on the reserved port 1."""
    assert health_check("agent", "redis://127.0.0.1:1/0") != 0
