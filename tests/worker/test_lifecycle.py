"""A group's states at its agent, with a launcher whose processes the test plays: what the state
machine decides does not depend on how ranks are started."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from nexrl_contract import names
from nexrl_contract.records import GroupRecord, JobRecord, Share
from nexrl_ledger import Ledger, connect
from nexrl_payloads import open_store
from nexrl_worker.agent.launcher import Exit, Slots
from nexrl_worker.agent.lifecycle import Host, Lifecycle, State
from nexrl_worker.channel import Channel
from nexrl_worker.settings import AgentSettings, GroupFolders

from tests.helpers.records import new_job
from tests.helpers.servers import wait_until


class Played:
    """A launcher of no processes. :attr:`ended` is how they ended, once they have."""

    def __init__(self) -> None:
        self.started, self.killed, self.checked = False, False, True
        self.ended: Exit | None = None

    def start(self) -> None:
        self.started = True

    def poll(self) -> Exit | None:
        return self.ended

    def kill(self) -> None:
        self.killed = True


class Placed:
    """A group of two ranks on an agent with two slots, whose life has begun."""

    def __init__(self, data: Path, redis_url: str) -> None:
        self.ledger = Ledger(connect(redis_url))
        self.launcher = Played()
        payloads = f"file://{data}/payloads"
        settings = AgentSettings(
            "here", redis_url, data, payloads, 2, (), None, False, stop_limit_s=7, log_bytes=1
        )
        self.host = Host(
            settings, "host", self.ledger, open_store(payloads), Slots(2, ()), self._launcher
        )
        placement = new_job("initialize_worker", identifier="student", queue=names.AGENT_QUEUE)
        group = GroupRecord(identifier="student", world_size=2, placement_job=placement.id)
        self.ledger.submit(placement, group=group)
        claimed = self.ledger.claim(names.AGENT_QUEUE, job_id=placement.id)
        assert claimed is not None
        self.placement = claimed
        self.life = Lifecycle(self.host, group, claimed, lambda life: None)
        self.life.begin()
        self.life.start()
        wait_until(lambda: self.launcher.started)

    def _launcher(self, *_: object) -> Played:
        return self.launcher

    @property
    def group(self) -> GroupRecord:
        group = self.ledger.groups.get("student")
        assert group is not None
        return group

    @property
    def channel(self) -> Channel:
        return GroupFolders(self.host.settings.data, "student").channel

    def meet(self) -> None:
        """The ranks have met."""
        self.ledger.groups.update("student", self.group.epoch, state="up")
        self.reaches(State.READY)

    def reaches(self, state: State) -> None:
        """The state comes; an end ends the thread, without processes and with its slots free."""
        wait_until(lambda: self.life.state is state, 10, state.name)
        if state not in (State.READY, State.STOPPING):
            assert self.life.join(5)
            assert (self.launcher.killed, self.host.slots.free) == (True, 2)

    def told(self) -> JobRecord:
        """What whoever waits for the placement has been told."""
        return self.ledger.require_job(self.placement.id)


@pytest.fixture
def placed(tmp_path: Path, redis_url: str) -> Placed:
    """A group that is starting."""
    return Placed(tmp_path, redis_url)


def test_ranks_that_end_unasked_take_the_group_down_with_their_cause(placed: Placed) -> None:
    """Also the placement fails with it, where the ranks had not met."""
    placed.launcher.ended = Exit("rank 1 was killed", 1)

    placed.reaches(State.DOWN)

    assert (placed.group.state, placed.group.cause) == ("down", "rank 1 was killed")
    assert "rank 1 was killed" in str(placed.told().error)


def test_an_end_is_told_although_the_processes_cannot_be_looked_at(
    placed: Placed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the agent has no descriptor left: slots and name must not be lost with it."""

    def kill() -> None:
        placed.launcher.killed = True
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(placed.launcher, "kill", kill)
    placed.launcher.ended = Exit("rank 1 was killed", 1)

    placed.reaches(State.DOWN)

    assert (placed.group.state, placed.group.cause) == ("down", "rank 1 was killed")


def test_a_stop_suspends_a_group_whose_ranks_leave_in_time(placed: Placed) -> None:
    """It is `starting` for everybody until the agent is back; its placement had been answered."""
    placed.meet()
    assert placed.told().state == "finished"
    placed.life.stop(time.monotonic() + 60)
    wait_until(lambda: placed.channel.stop_asked)
    placed.launcher.ended = Exit()

    placed.reaches(State.SUSPENDED)

    assert placed.group.state == "starting"


def test_a_stop_takes_a_group_down_whose_ranks_stay_too_long(placed: Placed) -> None:
    placed.meet()
    placed.life.stop(time.monotonic() + 0.3)

    placed.reaches(State.DOWN)

    assert "had not ended 7 s later" in str(placed.group.cause)


def test_models_that_no_rank_can_run_end_the_group_with_the_checks_word(placed: Placed) -> None:
    placed.channel.tell_refused({"code": "INVALID_CONFIG", "message": "no config.json"})

    placed.reaches(State.DESTROYED)

    assert (placed.told().error or {})["code"] == "INVALID_CONFIG"
    assert placed.group.state == "destroyed"


def test_a_destroy_is_no_failure_and_one_that_waits_is_done_whatever_happened(
    placed: Placed,
) -> None:
    placed.meet()
    destroy = new_job("destroy", identifier="student", queue=names.train_queue("student"))
    placed.ledger.submit(destroy)
    placed.launcher.ended = Exit("rank 0 was killed", 0)

    placed.reaches(State.DESTROYED)

    assert placed.ledger.require_job(destroy.id).state == "finished"


def test_an_incarnation_that_was_replaced_says_nothing_any_more(placed: Placed) -> None:
    placed.meet()
    elsewhere = [Share(agent="another", slots=2)]
    epoch = placed.ledger.groups.start_epoch("student", elsewhere)
    placed.launcher.ended = Exit("rank 0: Fenced", 0)

    placed.reaches(State.REPLACED)

    assert (placed.group.state, placed.group.epoch) == ("starting", epoch)
