"""The life of a group at its agent, as one state machine; docs/states.md draws it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any

import redis
from nexrl_contract import names
from nexrl_contract.errors import ServiceError
from nexrl_contract.operations import DESTROY
from nexrl_contract.records import GroupRecord, JobRecord, Share
from nexrl_ledger import Fenced, Ledger, until_redis
from nexrl_payloads import PayloadStore

from nexrl_worker.agent.launcher import Exit, Launcher, Slots
from nexrl_worker.settings import AgentSettings, GroupFolders
from nexrl_worker.snapshot import forget_snapshot, lost_operations, read_snapshot

POLL_S = 0.1
RENEW_S = 5.0
_log = logging.getLogger(__name__)


class State(Enum):
    """Where a group stands at its agent. The ledger says ``up`` or ``ready`` for READY, and
    ``starting`` for SUSPENDED, which is the promise to come back."""

    RESUMING = "the agent is back, and looks at what it held"
    STARTING = "processes start, and the ranks have not met"
    READY = "the ranks serve the group's queue"
    STOPPING = "the ranks were asked to end after their operation and to keep their state"
    SUSPENDED = "the ranks are gone, their state is on disk"
    DOWN = "the ranks are lost, and with them what the state on disk does not contain"
    DESTROYED = "nothing is left of the group"
    REPLACED = "another incarnation took its place; the ledger hears nothing of this one"


@dataclass(frozen=True, slots=True)
class Host:
    """What the groups of one agent share."""

    settings: AgentSettings
    address: str
    ledger: Ledger
    store: PayloadStore
    slots: Slots
    launcher: Callable[[AgentSettings, GroupRecord, int, tuple[str, ...]], Launcher]
    """Makes what starts the ranks of a group in an epoch, on those GPUs."""


class Lifecycle:
    """One group. The agent's main thread calls the public methods; from :meth:`start` on the group
    moves in a thread of its own.

    However that thread ends, the processes are gone, and ``released`` was called once.
    """

    def __init__(
        self,
        host: Host,
        group: GroupRecord,
        placement: JobRecord | None,
        released: Callable[[Lifecycle], None],
    ) -> None:
        self.identifier = group.identifier
        self.world_size = group.world_size
        self.state = State.RESUMING if placement is None else State.STARTING
        self._host = host
        self._ledger = host.ledger
        self._group = group
        self._epoch = group.epoch
        self._unanswered = placement
        self._renew_at = time.monotonic() + RENEW_S
        self._released = released
        self._folders = GroupFolders(host.settings.data, group.identifier)
        self._channel = self._folders.channel
        self._launcher: Launcher | None = None
        self._holds_slots = False
        self._gpus: tuple[str, ...] = ()
        self._stop_by: float | None = None
        self._thread = threading.Thread(
            target=self._run, name=f"group-{group.identifier}", daemon=True
        )

    # --- RESUMING -> STARTING, DOWN or DESTROYED ---

    @property
    def whole(self) -> bool:
        """Whether the state on disk holds every step that the group has finished."""
        snapshot = read_snapshot(self._folders.state)
        return snapshot.accounts_for(self._group.seq, self._group.epoch)

    def resume(self) -> State:
        """The agent was away. May be repeated while Redis is; raises Fenced when replaced."""
        group, groups = self._group, self._ledger.groups
        kept = read_snapshot(self._folders.state).seq
        job = self._ledger.job(group.running_job) if group.running_job else None
        if job is not None and not job.final:
            if job.operation == DESTROY:
                groups.mark_destroyed(self.identifier, group.epoch)
                return self._moved(State.DESTROYED)
            cause = "the agent stopped while this ran; whether it took effect is not known"
            self._ledger.finish(job, error=self._failed(cause))
        if not self.whole:
            self._begin_epoch()
            cause = f"its processes were killed: {lost_operations(group.seq - kept)}"
            groups.mark_down(self.identifier, self._epoch, cause, kept=kept)
            return self._moved(State.DOWN)
        if group.seq > kept:
            # Gradients that awaited optim_step ended with the ranks. Before the new epoch begins:
            # the snapshot excuses them for the incarnation that dropped them alone.
            lost = groups.roll_back(self.identifier, group.epoch, kept)
            self._group = group.model_copy(update={"seq": kept})
            _log.warning("gradients.lost identifier=%s forward_backwards=%d", self.identifier, lost)
        self._unanswered = self._ledger.claim(
            names.AGENT_QUEUE, job_id=group.placement_job or "-", stale_before=time.time()
        )
        return self._moved(State.STARTING)

    # --- STARTING -> READY, STOPPING or an end ---

    def begin(self) -> None:
        """Begin a new epoch and take the slots; raises Fenced when the group is gone."""
        self._begin_epoch()
        self._gpus = self._host.slots.take(self.world_size)
        self._holds_slots = True

    def _begin_epoch(self) -> None:
        """A new incarnation, all of whose ranks are this agent's."""
        agent, host = self._host.settings.name, self._host.address
        placement = [Share(agent=agent, slots=self.world_size, host=host)]
        self._epoch = self._ledger.groups.start_epoch(self.identifier, placement)

    def start(self) -> None:
        """Start the thread, from which the group may be released at once."""
        self._thread.start()

    def _starting(self) -> State:
        host = self._host
        launcher = host.launcher(host.settings, self._group, self._epoch, self._gpus)
        try:
            if not self._group.initialised:
                forget_snapshot(self._folders)  # of a former group of that name
            self._channel.clear()
            launcher.start()
        except OSError as error:
            launcher.kill()
            cause = f"could not be started on agent {host.settings.name}: {error}"
            return self._down(self._let_go(), f"its processes {cause}")
        self._launcher = launcher
        while (ended := launcher.poll()) is None:
            # Race: the check tells its verdict and ends. Asked in this order, a check that has
            # ended has told; the other way round a refusal between the two lines would be missed.
            # Who was answered long ago is not told: that group came up with these models once.
            answered = self._unanswered is None
            checked = answered or launcher.checked
            if not answered and (refusal := self._channel.refusal) is not None:
                _log.warning("group.refused identifier=%s %s", self.identifier, refusal["message"])
                refusal["identifier"] = self.identifier
                return self._destroyed(self._let_go(), None, refusal)
            with suppress(redis.exceptions.RedisError):  # the next look tries again
                if checked and (met := self._met()) is not None:
                    self._answer(result=met)
                    return State.READY
            # A stop waits for the check: a group that it refuses must not be kept.
            if self._stop_by is not None and (checked or time.monotonic() >= self._stop_by):
                return State.STOPPING
            self._pause()
        return self._ended(ended)

    def _met(self) -> dict[str, Any] | None:
        """What ``initialize_worker`` answers once the ranks have met, None before."""
        group = self._ledger.groups.get(self.identifier)
        if group is None or group.epoch != self._epoch or group.state not in ("up", "ready"):
            return None
        shown = {name: getattr(group, name) for name in ("role", "world_size", "ignored")}
        return {**shown, "already": False}

    # --- READY -> STOPPING or an end ---

    def _ready(self) -> State:
        assert self._launcher is not None
        while (ended := self._launcher.poll()) is None:
            if self._stop_by is not None:
                return State.STOPPING
            self._pause()
        return self._ended(ended)

    # --- STOPPING -> SUSPENDED, or another end ---

    def stop(self, deadline: float) -> None:
        """End the ranks after their operation, at the latest at that monotonic time."""
        self._stop_by = deadline  # written once, here; the group's own thread looks each POLL_S

    def join(self, timeout_s: float) -> bool:
        """Whether the group has come to an end within ``timeout_s``."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _stopping(self) -> State:
        assert self._launcher is not None and self._stop_by is not None
        while (ended := self._launcher.poll()) is None:
            if time.monotonic() >= self._stop_by:
                return self._ended(Exit(self._overdue()))
            if not self._channel.stop_asked:
                try:
                    self._channel.ask_to_stop()
                except OSError as error:  # a full disk: the next look tries again
                    _log.error("group.unstoppable identifier=%s %s", self.identifier, error)
            self._pause()
        return self._ended(ended)

    def _overdue(self) -> str:
        what = "its operation or the saving of its state"
        with suppress(redis.exceptions.RedisError):
            group = self._ledger.groups.get(self.identifier)
            running = group.running_job if group is not None else None
            job = self._ledger.job(running) if running is not None else None
            what = job.operation if job is not None else "the saving of its state"
        limit_s = self._host.settings.stop_limit_s
        return f"the service was stopped, and {what} had not ended {limit_s} s later"

    # --- the ends: processes gone, slots free, ledger told, placement answered ---

    def _ended(self, ended: Exit) -> State:
        """What the end of the processes means for the group, and for those who wait for it."""
        destroyed = self._channel.destroyed_by is not None
        doomed = self._let_go()
        if ended.cause is not None:
            destroyed = destroyed or any(job.operation == DESTROY for job in doomed)
        if destroyed:
            return self._destroyed(doomed, ended.cause)
        if ended.cause is not None:
            return self._down(doomed, ended.cause, ended.rank)
        return self._suspended()

    def _let_go(self) -> list[JobRecord]:
        """What waits in the group's queue, once its processes are gone and its slots are free."""
        self._release()
        # Race: the end of a group empties its queue, so this is read before. A job that comes in
        # between fails with the others; its payload stays for the janitor.
        return until_redis(lambda: self._ledger.waiting(names.train_queue(self.identifier)))

    def _suspended(self) -> State:
        met = until_redis(self._met)  # before its state says something else
        until_redis(
            lambda: self._ledger.groups.update(self.identifier, self._epoch, state="starting")
        )
        if met is not None:
            until_redis(lambda: self._answer(result=met))
        self._close([], self._not_started(None))
        return State.SUSPENDED

    def _destroyed(
        self, doomed: list[JobRecord], cause: str | None, refusal: dict[str, Any] | None = None
    ) -> State:
        """``refusal`` is what whoever waits for the placement is told."""
        forget_snapshot(self._folders)
        until_redis(
            lambda: self._ledger.groups.mark_destroyed(self.identifier, self._epoch, cause=cause)
        )
        self._close(doomed, refusal or self._not_started(cause))
        return State.DESTROYED

    def _down(self, doomed: list[JobRecord], cause: str, rank: int | None = None) -> State:
        kept = read_snapshot(self._folders.state).seq
        group = until_redis(lambda: self._ledger.groups.get(self.identifier))
        if group is not None and group.seq > kept:
            cause += f"; {lost_operations(group.seq - kept)}"
        _log.error("group.down identifier=%s epoch=%d %s", self.identifier, self._epoch, cause)
        until_redis(
            lambda: self._ledger.groups.mark_down(
                self.identifier, self._epoch, cause, rank=rank, kept=kept
            )
        )
        self._close(doomed, self._not_started(cause))
        return State.DOWN

    def _close(self, doomed: list[JobRecord], error: dict[str, Any]) -> None:
        until_redis(lambda: self._answer(error=error))
        for job in doomed:
            if job.payload is not None:
                self._host.store.discard(job.payload.id)

    # --- what moves it ---

    def _run(self) -> None:
        """From STARTING to an end; never raises."""
        try:
            while (step := _STEPS.get(self.state)) is not None:
                self._moved(step(self))
        except Fenced as error:
            _log.warning("group.fenced identifier=%s %s", self.identifier, error)
            self._moved(State.REPLACED)
        except Exception as error:
            _log.exception("group.lost identifier=%s", self.identifier)
            self._give_up(f"the agent could not watch it any more: {type(error).__name__}: {error}")
        finally:
            self._release()

    def _give_up(self, cause: str) -> None:
        self._release()
        self._moved(State.DOWN)
        try:
            until_redis(lambda: self._ledger.groups.mark_down(self.identifier, self._epoch, cause))
            self._close([], self._not_started(cause))
        except Exception:
            _log.exception("group.unreported identifier=%s", self.identifier)

    def _moved(self, state: State) -> State:
        """Every change of state stands in the agent's log."""
        moved = f"{self.state.name.lower()}->{state.name.lower()}"
        _log.info("group.moved identifier=%s epoch=%d %s", self.identifier, self._epoch, moved)
        self.state = state
        return state

    def _pause(self) -> None:
        """Until the next look; meanwhile nobody takes the placement for abandoned."""
        time.sleep(POLL_S)
        if self._unanswered is not None and time.monotonic() >= self._renew_at:
            with suppress(redis.exceptions.RedisError):
                self._ledger.renew(self._unanswered)
                self._renew_at = time.monotonic() + RENEW_S

    def _release(self) -> None:
        """The processes are gone, then the slots are free; may be repeated."""
        launcher, self._launcher = self._launcher, None
        if launcher is not None:
            try:
                launcher.kill()
            except Exception:  # what is left dies with this thread; the end must be told
                _log.exception("group.kill_failed identifier=%s", self.identifier)
        if self._holds_slots:
            self._holds_slots = False
            self._host.slots.give_back(self.world_size, self._gpus)
            self._released(self)

    def _failed(self, cause: str) -> dict[str, Any]:
        return ServiceError("OPERATION_FAILED", cause, identifier=self.identifier).body()

    def _not_started(self, cause: str | None) -> dict[str, Any]:
        why = cause or "the ranks were stopped before they had met"
        return self._failed(f"the group did not start: {why}")

    def _answer(self, **ending: Any) -> None:
        """End the placement job, if it has not ended."""
        if self._unanswered is not None:
            self._ledger.finish(self._unanswered, **ending)
            self._unanswered = None


_STEPS: dict[State, Callable[[Lifecycle], State]] = {
    State.STARTING: Lifecycle._starting,
    State.READY: Lifecycle._ready,
    State.STOPPING: Lifecycle._stopping,
}
"""What a group does in each state, until the next; the others are ends."""
