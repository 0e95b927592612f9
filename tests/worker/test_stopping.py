"""An agent that is asked to stop: what its groups keep, what they lose, and what is said of it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from nexrl_contract import names
from nexrl_contract.records import JobRecord
from nexrl_worker.snapshot import read_snapshot

from tests.helpers.agent import START_S, Agents
from tests.helpers.servers import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def batch(rows: int = 2, length: int = 8) -> dict[str, torch.Tensor]:
    """Tokens with advantages."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 64, (rows, length), generator=generator)
    return {"input_ids": tokens, "advantages": torch.ones(rows)}


def state(agents: Agents, job: JobRecord) -> str:
    return agents.ledger.require_job(job.id).state


def begin(agents: Agents, redis_url: str, model: Path, **settings: str) -> int:
    """An agent with a group of two ranks; rank 1's process, which a test may hold to make an
    operation last."""
    agents.start(redis_url, **settings)
    agents.ready(model, world_size=2)
    return int((agents.data / ".nexrl" / "groups" / "student" / "run" / "rank1.pid").read_text())


def test_only_pending_gradients_are_lost_in_a_clean_stop(
    agents: Agents, redis_url: str, model: Path
) -> None:
    """Weights, optimizer and schedule come back as the last step left them; each lost
    forward_backward is rolled back."""
    begin(agents, redis_url, model)
    updated = agents.ended(agents.submit_batch("update_actor", batch()))
    before = agents.fingerprint()
    lost = [agents.ended(agents.submit_batch("forward_backward", batch())) for _ in range(2)]
    assert [job.state for job in lost] == ["finished", "finished"]
    assert agents.stop() == 0
    agents.start(redis_url)
    wait_until(
        lambda: agents.group().epoch == 2 and agents.group().state in ("ready", "down"),
        START_S,
        "the group",
    )

    assert (agents.group().state, agents.group().cause) == ("ready", None)
    assert [state(agents, job) for job in (updated, *lost)] == [
        "finished",
        "rolled_back",
        "rolled_back",
    ]
    assert agents.group().seq == updated.seq
    assert agents.group().info["optimizer_steps"] == 1
    assert agents.fingerprint() == before

    # Nobody can take what is left for the whole: the next step says what is missing, once, and a
    # second stop forgets nothing.
    again = agents.ended(agents.submit_batch("forward_backward", batch()))
    assert agents.stop() == 0
    agents.start(redis_url)
    wait_until(
        lambda: agents.group().epoch == 3 and agents.group().state in ("ready", "down"),
        START_S,
        "the group",
    )
    refused = agents.ended(agents.submit("optim_step"))
    assert (refused.state, (refused.error or {})["code"]) == ("failed", "GRADIENTS_LOST")
    assert (refused.error or {})["jobs"] == [job.id for job in (*lost, again)]
    assert agents.fingerprint() == before
    nothing = agents.ended(agents.submit("optim_step")).result
    assert nothing is not None
    assert (nothing["metrics"]["step_applied"], nothing["meta_info"]["skipped"]) == (
        False,
        "nothing_to_learn",
    )

    # What a clean stop had dropped must not excuse a later crash.
    crashed = agents.ended(agents.submit_batch("update_actor", batch()))
    agents.stop(signal.SIGKILL)
    agents.start(redis_url)
    wait_until(lambda: agents.group().state == "down", 30, "the group's end")
    assert "rolled_back" in str(agents.group().cause)
    assert state(agents, crashed) == "rolled_back"


def test_gradients_before_the_first_step_are_all_that_is_lost(
    agents: Agents, redis_url: str, model: Path
) -> None:
    """A group that has not been trained comes back with the weights of its model folder."""
    begin(agents, redis_url, model)
    lost = agents.ended(agents.submit_batch("forward_backward", batch()))
    assert agents.stop() == 0
    agents.start(redis_url)
    wait_until(
        lambda: agents.group().epoch == 2 and agents.group().state in ("ready", "down"),
        START_S,
        "the group",
    )

    assert (agents.group().state, agents.group().seq, state(agents, lost)) == (
        "ready",
        0,
        "rolled_back",
    )


def test_a_group_that_does_not_stop_in_time_is_ended_with_the_true_cause(
    agents: Agents, redis_url: str, model: Path
) -> None:
    """The operation that took too long fails, and what had finished without being kept is rolled
    back."""
    rank = begin(agents, redis_url, model, NEXRL_STOP_LIMIT_S="2")
    lost = agents.ended(agents.submit_batch("update_actor", batch()))
    os.kill(rank, signal.SIGSTOP)
    late = agents.submit_batch("update_actor", batch())
    wait_until(lambda: state(agents, late) == "running", 10)

    assert agents.stop() == 0

    cause = str(agents.group().cause)
    assert agents.group().state == "down"
    assert "the service was stopped, and update_actor had not ended 2 s later" in cause
    assert "1 finished operations that changed the weights" in cause
    assert state(agents, lost) == "rolled_back"
    error = agents.ended(late).error
    assert error is not None
    assert (error["code"], cause in error["message"]) == ("OPERATION_FAILED", True)


def test_a_stop_waits_for_an_operation_and_keeps_what_it_did(
    agents: Agents, redis_url: str, model: Path
) -> None:
    """Nobody takes the agent for gone while it waits, and its end is clean."""
    rank = begin(agents, redis_url, model, NEXRL_STOP_LIMIT_S="60")
    os.kill(rank, signal.SIGSTOP)
    job = agents.submit_batch("update_actor", batch())
    wait_until(lambda: state(agents, job) == "running", 10)
    assert agents.process is not None
    agents.process.send_signal(signal.SIGTERM)
    asked = time.time()
    wait_until(
        lambda: agents.ledger.agents.heard()[0].heartbeat > asked + 1,
        15,
        "a beat of the agent that waits",
    )
    os.kill(rank, signal.SIGCONT)

    assert agents.process.wait(60) == 0
    assert state(agents, job) == "finished"
    assert read_snapshot(agents.data / ".nexrl" / "groups" / "student" / "state").seq == 1


def test_an_agent_without_the_slots_for_its_groups_is_never_heard_and_keeps_their_state(
    agents: Agents, redis_url: str, model: Path
) -> None:
    """It says what it needs and ends before anybody takes it for ready; with enough slots the
    group comes back."""
    begin(agents, redis_url, model)
    assert agents.stop() == 0
    assert agents.ledger.agents.heard() == []
    heard = agents.ledger.client.pubsub()
    agents.ledger.client.config_set("notify-keyspace-events", "Kgh")
    heard.psubscribe("__keyspace@0__:" + names.agent_key("here"))

    assert agents.start(redis_url, slots=1).wait(START_S) == 1

    assert "need 2 slots" in agents.log.read_text()
    messages = [heard.get_message(timeout=0.2) for _ in range(3)]
    heard.close()
    agents.ledger.client.config_set("notify-keyspace-events", "")
    assert [message["type"] for message in messages if message] == ["psubscribe"]
    agents.start(redis_url, slots=2)
    wait_until(lambda: agents.group().state == "ready", START_S, "the group")


def test_an_operation_ends_although_redis_took_no_writes_when_it_did(
    agents: Agents, redis_url: str, model: Path
) -> None:
    """Redis' disk was full for a moment: the job is reported when there is room, and the next one
    runs."""
    rank = begin(agents, redis_url, model)
    os.kill(rank, signal.SIGSTOP)
    job = agents.submit("barrier")
    wait_until(lambda: state(agents, job) == "running", 10)
    agents.ledger.client.config_set("min-replicas-to-write", 1)
    try:
        os.kill(rank, signal.SIGCONT)
        time.sleep(1)
    finally:
        agents.ledger.client.config_set("min-replicas-to-write", 0)

    assert agents.ended(job, 15).state == "finished"
    assert agents.ended(agents.submit("barrier"), 15).state == "finished"
