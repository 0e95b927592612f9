"""The agent on real processes: whatever dies or is lost, groups are what the ledger says, and slots
come back."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from nexrl_contract import names
from nexrl_contract.records import Share
from nexrl_ledger import Fenced
from nexrl_worker.agent import agent as upkeep

from tests.helpers.agent import START_S, Agents
from tests.helpers.lossy_redis import LosesReplies
from tests.helpers.records import new_job
from tests.helpers.servers import RedisServer, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_ranks_that_still_start_die_with_their_agent(
    agents: Agents, redis_url: str, model: Path
) -> None:
    """They load torch for seconds before they could notice anything themselves."""
    agents.start(redis_url)
    agents.place(model, world_size=2)
    wait_until(lambda: len(agents.ranks()) >= 2, START_S, "the ranks")

    agents.stop(signal.SIGKILL)

    wait_until(lambda: not agents.ranks(), 10, "the end of every rank")


def test_a_group_that_cannot_be_started_is_down_and_the_agent_goes_on(
    agents: Agents, redis_url: str, model: Path
) -> None:
    """Its slots are free again, and the next group starts; a group whose ranks die at the start is
    down, too."""
    groups = agents.data / ".nexrl" / "groups"
    groups.mkdir(parents=True)
    (groups / "student").write_text("no folder")
    agents.start(redis_url)

    failed = agents.ended(agents.place(model))

    assert failed.error is not None
    assert "could not be started" in failed.error["message"]
    assert agents.group().state == "down"
    other = agents.place(model, "other", world_size=2)
    pid = wait_until(
        lambda: (groups / "other" / "run" / "rank1.pid").read_text() if _started(groups) else "",
        START_S,
    )
    os.kill(int(pid), signal.SIGKILL)
    assert agents.ended(other).state == "failed"
    assert (agents.group("other").state, agents.free()) == ("down", 2), (
        "who hears of the failure sees the truth"
    )


def _started(groups: Path) -> bool:
    return (groups / "other" / "run" / "rank1.pid").exists()


def test_a_claim_whose_reply_is_lost_still_runs_and_a_replaced_group_gives_its_slots_back_once(
    agents: Agents, redis_server: RedisServer, redis_url: str, model: Path
) -> None:
    lossy = LosesReplies(redis_server.port)
    agents.start(lossy.url)
    agents.ready(model)
    barrier = agents.submit("barrier")
    lost = wait_until(lambda: agents.ended(barrier).attempt, 10)
    job = new_job("barrier", identifier="student", queue=names.train_queue("student"))
    lossy.reply = b"OK\r\n$32\r\n" + job.id.encode()
    agents.ledger.submit(job)

    ended = agents.ended(job, 10)

    assert lossy.reply is None, "nothing was lost"
    assert (lost, ended.state, ended.attempt) == (1, "finished", 2)

    agents.ledger.groups.start_epoch("student", [Share(agent="another", slots=1, host="host")])
    wait_until(lambda: agents.free() == 2, 20, "the slots")
    wait_until(lambda: not agents.ranks(), 10, "the end of the ranks")
    agents.ready(model, "next", world_size=2)
    assert agents.free() == 0
    lossy.close()


def test_a_name_that_is_used_again_never_gets_the_former_groups_weights(
    agents: Agents, redis_url: str, model: Path
) -> None:
    """A clean stop keeps the state of the group, until the group is destroyed."""
    agents.start(redis_url)
    agents.ready(model)
    state = agents.data / ".nexrl" / "groups" / "student" / "state"
    agents.ended(agents.submit("load_checkpoint", path=str(model)))
    assert agents.stop() == 0
    assert state.is_dir()

    agents.start(redis_url, slots=1)
    wait_until(lambda: agents.group().state == "ready", START_S, "the group")
    agents.ended(agents.submit("destroy"))
    assert not state.exists()
    wait_until(lambda: not state.parent.exists(), 20, "the end of the group's folder")
    assert (agents.data / ".nexrl" / "logs" / "groups" / "student" / "rank0.log").exists()


def test_what_destroyed_groups_leave_is_bounded(
    agents: Agents, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No state, and logs of the last few; a living group, or one that Redis does not know, keeps
    its state."""
    monkeypatch.setattr(upkeep, "LOGS_KEPT", 2)
    own = agents.data / ".nexrl"
    for days, name in enumerate(["living", "last", "last-but-one", "earlier", "old", "earliest"]):
        if name != "old":
            agents.place(Path("/nowhere"), name)
        if name not in ("living", "old"):
            agents.ledger.groups.mark_destroyed(name, None)
        (own / "groups" / name / "state").mkdir(parents=True)
        log = own / "logs" / "groups" / name / "rank0.log"
        log.parent.mkdir(parents=True)
        log.write_text("a line")
        for path in (log, log.parent):
            os.utime(path, times=(time.time() - days * 24 * 3600,) * 2)
    (own / "groups" / ".gone-half").mkdir()

    upkeep.clear_destroyed(agents.ledger, agents.data, [])
    assert sorted(path.name for path in (own / "groups").iterdir()) == ["living", "old"]
    assert sorted(path.name for path in (own / "logs" / "groups").iterdir()) == [
        "last",
        "last-but-one",
        "living",
    ]

    monkeypatch.setattr(upkeep, "LOGS_KEPT_S", 1.5 * 24 * 3600)
    upkeep.clear_destroyed(agents.ledger, agents.data, [])
    assert sorted(path.name for path in (own / "logs" / "groups").iterdir()) == ["last", "living"]


def test_a_placement_left_behind_by_a_former_group_does_not_place_the_next_one(
    agents: Agents, redis_url: str, model: Path
) -> None:
    """Its agent was lost while it placed; the group was taken for lost, destroyed, and made
    again."""
    former = agents.place(model)
    assert agents.ledger.claim(names.AGENT_QUEUE, job_id=former.id) is not None
    epoch = agents.ledger.groups.start_epoch("student", [Share(agent="lost", slots=1, host="host")])
    agents.ledger.groups.mark_down("student", epoch, "its agent has not been heard")
    agents.ledger.groups.mark_destroyed("student", epoch)
    agents.ledger.client.hset(names.job_key(former.id), "lease_at", "0")
    wanted = agents.place(model)

    agents.start(redis_url)

    assert agents.ended(wanted).state == "finished"
    assert agents.ended(former, 20).state == "failed"


def test_a_destroy_that_waits_is_done_when_the_group_goes_down(
    agents: Agents, redis_url: str, model: Path
) -> None:
    """Nobody who wanted the group gone is told that it failed."""
    agents.start(redis_url)
    placement = agents.place(model)
    pid = wait_until(lambda: _pid(agents), START_S)
    destroy = agents.submit("destroy")
    os.kill(pid, signal.SIGKILL)

    assert agents.ended(destroy).state == "finished"
    assert agents.ended(placement).state == "failed"
    assert agents.group().state == "destroyed"


def _pid(agents: Agents) -> int:
    try:
        return int(
            (agents.data / ".nexrl" / "groups" / "student" / "run" / "rank0.pid").read_text()
        )
    except (FileNotFoundError, ValueError):
        return 0


def test_a_barrier_behind_a_save_waits_until_it_is_published(
    agents: Agents, redis_url: str, model: Path
) -> None:
    """Of the two halves of a save the second is the checkpointer's; what does not count on it need
    not wait."""
    agents.start(redis_url)
    agents.ready(model)
    save = agents.submit("save_checkpoint", local_path=str(agents.data / "step_1"), global_step=1)
    wait_until(lambda: agents.ledger.waiting(names.CHECKPOINT_QUEUE), 20, "the hand-over")
    assert agents.ended(agents.submit("init_model"), 20).state == "finished"
    load = agents.submit("load_checkpoint", path=str(model))
    barrier = agents.submit("barrier")

    wait_until(lambda: agents.ledger.require_job(load.id).waits_for, 10, "a reason")
    reason = agents.ledger.require_job(load.id).waits_for
    time.sleep(1)
    states = [agents.ledger.require_job(job.id).state for job in (load, barrier)]
    agents.published(save)

    assert reason is not None and save.id in reason and states == ["queued", "queued"]
    assert [agents.ended(job, 20).state for job in (load, barrier)] == ["finished", "finished"]
    assert agents.ledger.require_job(load.id).waits_for is None


def test_a_group_whose_loss_was_half_reported_is_down_all_the_same(
    agents: Agents, redis_server: RedisServer, redis_url: str, model: Path
) -> None:
    """The agent that found its ranks killed loses Redis while it says so; it must not take what is
    left for all there was."""
    agents.start(redis_url)
    agents.ready(model)
    lost = agents.ended(agents.submit("load_checkpoint", path=str(model)))
    assert (lost.state, agents.group().seq) == ("finished", 1)
    agents.stop(signal.SIGKILL)
    for unknown in (
        agents.ledger.groups.mark_down,
        agents.ledger.groups.roll_back,
    ):  # Redis keeps a script that it was once asked for
        with pytest.raises(Fenced):
            unknown("nobody", 1, 0)
    lossy = LosesReplies(redis_server.port)
    lossy.command = names.applied_key("student").encode()

    agents.start(lossy.url)
    wait_until(
        lambda: agents.group().epoch > 1 and agents.group().state in ("down", "ready"),
        START_S,
        "the end",
    )

    assert lossy.command is None, "nothing was lost"
    assert (agents.group().state, agents.ledger.require_job(lost.id).state) == (
        "down",
        "rolled_back",
    )
    assert "1 finished operations" in str(agents.group().cause)
    lossy.close()
