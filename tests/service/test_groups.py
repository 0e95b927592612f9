"""Groups come, wait for slots, fail with a cause, and go."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path

import pytest
import requests
from nexrl_client import GroupDown, HTTPTrainServiceClient, OperationFailed

from tests.helpers.servers import wait_until
from tests.helpers.service import StartGroup, make_batch
from tests.helpers.stack import Stack

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


def test_a_rank_that_gets_no_more_memory_takes_less_and_the_group_lives(
    start_group: StartGroup, stack: Stack
) -> None:
    """Allocations that fail for real, on one rank of two: the step is that of a group with enough,
    and says so."""
    batch = make_batch(rows=400, length=128, responses=64)
    groups = [start_group(name, world_size=2) for name in ("plenty", "short")]
    pid = int((stack.data / ".nexrl" / "groups" / "short" / "run" / "rank1.pid").read_text())
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    held = next(int(line.split()[1]) for line in lines if line.startswith("VmSize:")) * 1024
    resource.prlimit(pid, resource.RLIMIT_AS, (held + 40 * 2**20, resource.RLIM_INFINITY))

    enough, short = (group.update_actor(batch)["metrics"] for group in groups)

    assert "memory/retries" not in enough and short["memory/retries"] >= 1
    assert short["actor/grad_norm"] == pytest.approx(enough["actor/grad_norm"], rel=1e-4)
    scores, others = (group.compute_log_prob(batch)["batch"]["old_log_probs"] for group in groups)
    assert (scores - others).abs().max() < 5e-3
    for group in groups:
        group.destroy()
