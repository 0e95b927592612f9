"""kill -9 of each process under a running trainer: its call ends with the result, once, or with the
cause."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nexrl_client import GroupDown, HTTPTrainServiceClient, JobRolledBack, OperationFailed

from tests.helpers.servers import wait_until
from tests.helpers.service import fingerprint, make_batch
from tests.helpers.stack import Stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def own_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack that may be hurt."""
    stack = Stack(tmp_path_factory.mktemp("faults") / "data", "--slots", "2")
    try:
        yield stack.until_ready()
    finally:
        stack.stop()
        assert not stack.processes()


@pytest.fixture
def trained(own_stack: Stack, tiny_model: Path) -> Iterator[HTTPTrainServiceClient]:
    client = HTTPTrainServiceClient(own_stack.url, "student")
    client.initialize_worker(
        config_dict={"actor": {"model": {"path": str(tiny_model)}, "optim": {"lr": 1e-3}}},
        role="actor",
        world_size=1,
    )
    client.init_model()
    yield client
    client.destroy()


def during(act: Callable[[], Any], hurt: Callable[[], None]) -> Any:
    """The result of ``act`` in a thread, with ``hurt`` while it runs."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(act()))
    thread.start()
    hurt()
    thread.join(120)
    assert results, "the call did not come back"
    return results[0]


def kill(stack: Stack, module: str) -> None:
    os.kill(stack.process_of(module).pid, signal.SIGKILL)


def large(seed: int = 0) -> dict[str, Any]:
    """A batch whose update takes a second or more."""
    return make_batch(rows=512, length=256, responses=128, seed=seed)


@pytest.mark.parametrize("victim", ["nexrl_gateway", "valkey-server"])
def test_an_update_survives_the_death_of_what_carries_it_and_trains_once(
    own_stack: Stack, trained: HTTPTrainServiceClient, victim: str
) -> None:
    trained.save_checkpoint(f"faults/{victim}", remove_previous_ckpt=False)
    trained.update_actor(large())
    undisturbed = fingerprint(trained)
    trained.load_checkpoint(f"faults/{victim}")

    def hurt() -> None:
        wait_until(
            lambda: trained.get_models()["models"]["student"].get("running_job") or _runs(trained),
            20,
        )
        kill(own_stack, victim)

    result = during(lambda: trained.update_actor(large()), hurt)

    assert result["metrics"]["step_applied"] is True
    assert fingerprint(trained) == undisturbed


def _runs(client: HTTPTrainServiceClient) -> bool:
    return any(job["state"] == "running" for job in client.jobs(limit=3))


def test_a_save_survives_the_death_of_the_checkpointer(
    own_stack: Stack, trained: HTTPTrainServiceClient
) -> None:
    saved = during(
        lambda: trained.save_checkpoint("faults/checkpointer", global_step=7),
        lambda: kill(own_stack, "nexrl_checkpointer"),
    )

    assert saved["global_step"] == 7
    assert trained.load_checkpoint("faults/checkpointer")["global_step"] == 7


def test_a_killed_agent_loses_the_weights_and_says_so(
    own_stack: Stack, trained: HTTPTrainServiceClient
) -> None:
    """Its ranks die with it. What had been trained is marked rolled back; the group is down until
    it is made again."""
    learned = trained.submit("update_actor", make_batch())
    learned.result(60)

    kill(own_stack, "nexrl_worker.agent")
    cause = wait_until(lambda: trained.get_models()["models"]["student"]["cause"], 30)

    assert "1 finished operation" in cause
    assert learned.status()["state"] == "rolled_back"
    assert not own_stack.running("nexrl_worker.rank")
    with pytest.raises(JobRolledBack):
        learned.result(5)
    asked = time.monotonic()
    with pytest.raises(GroupDown, match="destroy"):
        trained.barrier()
    assert time.monotonic() - asked < 20, "a group that is down was waited for"


def test_a_killed_agent_brings_an_untrained_group_back(
    own_stack: Stack, trained: HTTPTrainServiceClient
) -> None:
    before = trained.compute_log_prob(make_batch())["batch"]["old_log_probs"]
    rank = int((own_stack.data / ".nexrl" / "groups" / "student" / "run" / "rank0.pid").read_text())
    running = trained.submit("compute_log_prob", large())
    wait_until(lambda: _runs(trained), 10)
    os.kill(rank, signal.SIGSTOP)  # or it could end while the agent's process is looked for

    kill(own_stack, "nexrl_worker.agent")

    with pytest.raises(OperationFailed, match="agent"):
        running.result(120)
    after = trained.compute_log_prob(make_batch())["batch"]["old_log_probs"]
    assert bool((before == after).all())


def test_after_ctrl_c_the_groups_come_back_as_they_were(tmp_path: Path, tiny_model: Path) -> None:
    """Weights, moments and schedule; and after kill -9 of everything what was lost is said."""
    data = tmp_path / "data"
    first = Stack(data, "--slots", "1").until_ready()
    client = HTTPTrainServiceClient(first.url, "student")
    client.initialize_worker(
        config_dict={"actor": {"model": {"path": str(tiny_model)}, "optim": {"lr": 1e-3}}},
        world_size=1,
    )
    client.init_model()
    job = client.submit("update_actor", make_batch())
    job.result(60)
    before = fingerprint(client)
    assert first.stop() == 0

    second = Stack(data, "--slots", "1").until_ready()
    client = HTTPTrainServiceClient(second.url, "student")
    assert fingerprint(client) == before
    assert client.job(job.id).status()["state"] == "finished"
    client.update_actor(make_batch())
    second.process.kill()
    second.process.wait()
    wait_until(lambda: not second.processes(), 10, "the death of every process")

    third = Stack(data, "--slots", "1").until_ready()
    client = HTTPTrainServiceClient(third.url, "student")
    group = wait_until(
        lambda: (group := client.get_models()["models"]["student"])["cause"] and group, 30
    )
    assert group["state"] == "down"
    assert "1 finished operation" in group["cause"]
    assert third.stop() == 0
