"""Groups come, wait for slots, fail with a cause, and go."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import requests
from conftest import wait_until
from nexrl_client import GroupDown, HTTPTrainServiceClient, OperationFailed
from running_stack import Stack
from service_kit import StartGroup, make_batch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_a_group_that_finds_no_slot_waits_says_so_and_gets_it(
    student: HTTPTrainServiceClient, start_group: StartGroup, stack: Stack, tiny_model: Path
) -> None:
    first = HTTPTrainServiceClient(stack.url, "first")
    config = {"actor": {"model": {"path": str(tiny_model)}}}
    first.initialize_worker(config_dict=config, world_size=1)
    second = HTTPTrainServiceClient(stack.url, "second")
    free = int(second.health_check()["slots"]["free"])
    placement = second.submit("initialize_worker", config_dict=config, world_size=free + 1)
    waiting = wait_until(lambda: (view := placement.status())["waits_for"] and view, 10)

    first.destroy()

    assert waiting["state"] == "queued"
    assert f"{free + 1} " in waiting["waits_for"]
    assert "slots" in waiting["waits_for"]
    assert placement.result(120)["world_size"] == free + 1
    second.destroy()
    assert second.health_check()["slots"]["free"] == free + 1


def test_a_dead_rank_takes_the_group_down_with_its_cause_and_fails_its_jobs(
    student: HTTPTrainServiceClient, start_group: StartGroup, stack: Stack
) -> None:
    """In ten seconds; and the group can be destroyed and made again."""
    doomed = start_group("doomed", world_size=2)
    running = doomed.submit("compute_log_prob", make_batch(rows=1024, length=512, responses=256))
    wait_until(lambda: running.status()["state"] == "running", 10)
    queued = doomed.submit("update_actor", make_batch())
    pid = int((stack.data / ".nexrl" / "groups" / "doomed" / "run" / "rank1.pid").read_text())
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)

    with pytest.raises(OperationFailed, match="rank 1"):
        running.result(30)
    with pytest.raises(GroupDown):
        queued.result(5)
    with pytest.raises(GroupDown, match="rank 1"):
        doomed.request_timeout = 3
        doomed.barrier()

    assert time.monotonic() - killed < 10 + 3
    assert "rank 1 was killed by SIGKILL" in doomed.get_models()["models"]["doomed"]["cause"]
    doomed.request_timeout = 200
    doomed.destroy()
    again = start_group("doomed", world_size=1)
    assert again.update_actor(make_batch())["metrics"]["step_applied"] is True
    again.destroy()


def test_health_is_true(student: HTTPTrainServiceClient, stack: Stack) -> None:
    health = requests.get(f"{stack.url}/health", timeout=5).json()

    assert (health["status"], health["redis"], health["payload_store"]) == ("healthy", "ok", "ok")
    assert health["groups"]["student"]["state"] == "ready"
    assert time.time() - health["groups"]["student"]["last_heartbeat"] < 10
    assert requests.get(f"{stack.url}/ready", timeout=5).status_code == 200
