"""What an operator does to a running stack: Ctrl-C at any moment, too few slots, a full disk.
Nothing that was learned is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
import requests
from nexrl_client import HTTPTrainServiceClient
from nexrl_ledger import connect

from tests.helpers.servers import wait_until
from tests.helpers.service import fingerprint, make_batch
from tests.helpers.stack import Stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
Start = Callable[..., Stack]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def start(data: Path) -> Iterator[Start]:
    """start(*options): ``nexrl up`` on the test's folder; killed at the end where it still runs."""
    started: list[Stack] = []

    def begin(*options: str, prefix: tuple[str, ...] = ()) -> Stack:
        started.append(Stack(data, *options, prefix=prefix))
        return started[-1]

    yield begin
    for stack in started:
        stack.process.kill()
        stack.process.wait()
    wait_until(
        lambda: not any(stack.processes() for stack in started), 10, "the end of every process"
    )


def trained(stack: Stack, model: Path, world_size: int) -> HTTPTrainServiceClient:
    """A group ``student`` with one update."""
    client = HTTPTrainServiceClient(stack.url, "student")
    actor = {"model": {"path": str(model)}, "optim": {"lr": 1e-3}}
    client.initialize_worker(config_dict={"actor": actor}, world_size=world_size)
    client.init_model()
    client.update_actor(make_batch())
    return client


def hold(stack: Stack, client: HTTPTrainServiceClient) -> tuple[int, str]:
    """Make an update last: the process of rank 1, which is held, and the id of the update that
    waits for it."""
    rank = int((stack.data / ".nexrl" / "groups" / "student" / "run" / "rank1.pid").read_text())
    os.kill(rank, signal.SIGSTOP)
    job = client.submit("update_actor", make_batch())
    wait_until(lambda: job.status()["state"] == "running", 20)
    return rank, job.id


def test_ctrl_c_waits_for_what_runs_and_says_so(start: Start, tiny_model: Path) -> None:
    """The update is kept; with too few slots for the group there is no ready line, and a second
    Ctrl-C ends at once."""
    stack = start("--slots", "2").until_ready()
    rank, job = hold(stack, trained(stack, tiny_model, 2))
    stack.process.send_signal(signal.SIGINT)
    said = wait_until(lambda: "stopping" in stack.err and stack.err, 10)
    assert "waiting at most 30 min for student: update_actor, " in said
    assert " s so far" in said
    assert "a second Ctrl-C stops at once" in said
    stack.process_of("valkey-server").kill()
    wait_until(lambda: "still waiting for agent: student: update_actor" in stack.err, 30)
    os.kill(rank, signal.SIGCONT)
    assert stack.process.wait(60) == 0
    assert "killed" not in stack.err.replace("SIGKILL", "")

    small = start("--slots", "1")
    assert small.process.wait(120) == 1
    assert small.out == ""
    assert "need 2 slots" in small.err

    stack = start("--slots", "2").until_ready()
    client = HTTPTrainServiceClient(stack.url, "student")
    assert client.job(job).status()["state"] == "finished"
    wait_until(lambda: client.worker_info()["state"] == "ready", 120)
    assert client.worker_info()["seq"] == 2
    hold(stack, client)
    stack.process.send_signal(signal.SIGINT)
    wait_until(lambda: "stopping" in stack.err, 10)
    time.sleep(1.2)  # an earlier one may be the same Ctrl-C
    stack.process.send_signal(signal.SIGINT)
    assert stack.process.wait(10) == 0
    assert not stack.processes()


def test_a_full_disk_is_waited_out(start: Start, data: Path, tiny_model: Path) -> None:
    """It is said once; the stack goes on by itself when there is room, with the weights that it
    had."""
    namespace = ("unshare", "--user", "--map-root-user", "--mount")
    if subprocess.run([*namespace, "true"], check=False).returncode != 0:
        pytest.skip("a small disk needs user namespaces")
    data.mkdir()
    mount = ("sh", "-c", 'mount -t tmpfs -o size=128m small "$0" && exec "$@"', str(data))
    stack = start("--slots", "1", prefix=(*namespace, *mount)).until_ready()
    client = trained(stack, tiny_model, 1)
    before = fingerprint(client)
    epoch = client.get_models()["models"]["student"]["epoch"]
    filler = Path(f"/proc/{stack.process.pid}/root{data}/filler")

    _fill(stack, filler)
    wait_until(lambda: "is full" in stack.err, 30, "a word about the disk")
    ready = requests.get(f"{stack.url}/ready", timeout=10)
    assert ready.status_code == 503
    assert any("is full: free " in reason for reason in ready.json()["reasons"]), ready.text
    assert stack.status()["status"] == "degraded"
    time.sleep(15)  # five starts in vain would long be over

    assert stack.process.poll() is None
    assert stack.err.count("is full: free ") == 1
    filler.unlink()
    wait_until(lambda: "there is room again; redis is started" in stack.err, 10)
    assert fingerprint(client) == before
    assert client.update_actor(make_batch())["meta_info"]["weight_version"] == 2
    group = client.get_models()["models"]["student"]
    assert (group["state"], group["epoch"]) == ("ready", epoch)

    # Ctrl-C while it is full keeps the state as soon as it can be written.
    _fill(stack, filler)
    wait_until(lambda: stack.err.count("is full: free ") == 2, 30)
    stack.process.send_signal(signal.SIGINT)
    wait_until(lambda: "still waiting for agent: the disk of" in stack.err, 30)
    filler.unlink()
    assert stack.process.wait(60) == 0
    assert "killed" not in stack.err


def _fill(stack: Stack, filler: Path) -> None:
    """No page of the disk is left, and none in the append-only file: what Redis writes next is too
    much."""
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    with connect(stack.redis_url) as client, contextlib.suppress(redis.exceptions.RedisError):
        client.set("filler", bytes(8192))
