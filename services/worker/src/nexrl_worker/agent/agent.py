"""The agent: ``python -m nexrl_worker.agent``. It offers slots, places groups on them, and tells
the ledger how they fare."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time

import redis
from nexrl_contract import names
from nexrl_contract.errors import ServiceError
from nexrl_contract.operations import DESTROY
from nexrl_contract.records import GroupRecord, JobRecord, ProcessRecord, Share
from nexrl_host.processes import rotate_logs
from nexrl_ledger import Fenced, Ledger, QueueConsumer, connect
from nexrl_payloads import open_store

from nexrl_worker.agent.launcher import GroupProcess
from nexrl_worker.agent.lifecycle import GroupWatch, clear_destroyed, clear_staging
from nexrl_worker.agent.slots import Slots
from nexrl_worker.settings import AgentSettings, GroupFolders
from nexrl_worker.snapshot import Snapshot, lost_operations, read_snapshot

BEAT_S = 5.0
WATCHER_END_S = 15.0
LEASE_S = 60.0
_log = logging.getLogger(__name__)


class Agent:
    """One host's slots. Groups are started in the main thread and watched each in a thread of its
    own."""

    def __init__(self, settings: AgentSettings) -> None:
        self._settings = settings
        self._ledger = Ledger(connect(settings.redis_url))
        self._store = open_store(settings.payloads)
        self._slots = Slots(settings.slots, settings.gpus)
        self._running: dict[str, GroupProcess] = {}
        self._watchers: list[threading.Thread] = []
        self._beat_at = 0.0
        self._consumer = QueueConsumer(
            settings.redis_url,
            names.AGENT_QUEUE,
            name=f"agent-{settings.name}",
            on_wake=self._wake,
        )

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then stop the groups so that they can come back."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._consumer.stop())
        # Not heard before it has brought its groups back: one that cannot is not there.
        self._consumer.until_redis(self._bring_back)
        self._consumer.until_redis(self._beat)
        self._consumer.run()
        self._stop_groups()
        with contextlib.suppress(redis.exceptions.RedisError):
            self._ledger.agents.sign_off(self._settings.name)

    # --- placing ---

    def _wake(self) -> None:
        if time.monotonic() - self._beat_at >= BEAT_S:
            self._beat()
            clear_staging(self._ledger, self._settings.data)
            clear_destroyed(self._ledger, self._settings.data, list(self._running))
            for process in list(self._running.values()):
                rotate_logs(process.folders.logs, self._settings.log_bytes)
        self._place_waiting()

    def _beat(self) -> None:
        self._beat_at = time.monotonic()
        self._ledger.agents.beat(
            ProcessRecord(
                name=self._settings.name,
                host=socket.gethostname(),
                device="cuda" if self._settings.gpus else "cpu",
                slots=self._settings.slots,
                free=self._slots.free,
                identifier=self._settings.identifier,
                pid=os.getpid(),
            )
        )

    def _place_waiting(self) -> None:
        """Claim every placement job that fits; say why the others wait."""
        for job in self._ledger.waiting(names.AGENT_QUEUE):
            if job.identifier in self._running or self._settings.identifier not in (
                None,
                job.identifier,
            ):
                continue
            group = self._ledger.groups.get(job.identifier)
            if group is not None and (group.state == "destroyed" or group.placement_job != job.id):
                group = None  # or another of that name: its own job places it
            if group is not None and group.world_size > self._slots.free:
                self._ledger.explain_wait(
                    job.id, self._slots.shortage(group.world_size, self._settings.name)
                )
                continue
            stale = time.time() - LEASE_S
            claimed = self._ledger.claim(names.AGENT_QUEUE, job_id=job.id, stale_before=stale)
            if claimed is None:
                continue
            try:
                if group is None:
                    raise Fenced(f"group {job.identifier!r} is gone")
                self._start(group, claimed)
            except Fenced as error:
                _log.warning("placement.fenced job_id=%s %s", job.id, error)
                self._refuse(
                    claimed, "GROUP_NOT_READY", "the group was destroyed before it was started"
                )

    def _start(self, group: GroupRecord, placement: JobRecord | None) -> None:
        """A group that this machine cannot start is down, with the cause; raises Fenced where it is
        gone."""
        identifier = group.identifier
        epoch = self._start_epoch(group)
        gpus = self._slots.take(group.world_size)
        try:
            process = GroupProcess(self._settings, group, epoch, gpus)
        except OSError as error:
            self._slots.give_back(group.world_size, gpus)
            cause = f"its processes could not be started on agent {self._settings.name}: {error}"
            _log.error("group.down identifier=%s epoch=%d %s", identifier, epoch, cause)
            self._consumer.until_redis(
                lambda: self._ledger.groups.mark_down(identifier, epoch, cause)
            )
            if placement is not None:
                self._refuse(placement, "OPERATION_FAILED", cause)
            return
        self._running[identifier] = process
        _log.info(
            "group.started identifier=%s epoch=%d world_size=%d",
            identifier,
            epoch,
            group.world_size,
        )
        watch = GroupWatch(self._ledger, self._store, process, placement, self._release)
        watcher = threading.Thread(target=watch.run, name=f"watch-{identifier}", daemon=True)
        self._watchers = [each for each in self._watchers if each.is_alive()] + [watcher]
        watcher.start()
        self._show_slots()

    def _start_epoch(self, group: GroupRecord) -> int:
        """A new incarnation, all of whose ranks are this agent's."""
        share = Share(agent=self._settings.name, slots=group.world_size, host=socket.gethostname())
        return self._ledger.groups.start_epoch(group.identifier, [share])

    def _refuse(self, placement: JobRecord, code: str, reason: str) -> None:
        error = ServiceError(code, reason, identifier=placement.identifier).body()
        try:
            self._consumer.until_redis(lambda: self._ledger.finish(placement, error=error))
        except Fenced as replaced:
            _log.warning("placement.fenced job_id=%s %s", placement.id, replaced)

    def _release(self, process: GroupProcess) -> None:
        """A group's processes are gone. Called from the thread that watched it."""
        self._slots.give_back(process.world_size, process.gpus)
        self._running.pop(process.identifier, None)
        self._show_slots()

    def _show_slots(self) -> None:
        try:
            self._beat()
        except redis.exceptions.RedisError:
            _log.warning("agent.beat_missed")

    # --- coming back ---

    def _bring_back(self) -> None:
        """Groups that this agent held before it was restarted: start them again, or say what was
        lost. May be repeated."""
        mine = [
            group
            for group in self._ledger.groups.living()
            if group.leader == self._settings.name
            and group.state in ("starting", "up", "ready")
            and group.identifier not in self._running
        ]
        kept = {group.identifier: read_snapshot(self._folders(group).state) for group in mine}
        whole = [
            group for group in mine if kept[group.identifier].accounts_for(group.seq, group.epoch)
        ]
        needed = sum(group.world_size for group in whole)
        if needed > self._slots.free:
            names_of = ", ".join(group.identifier for group in whole)
            sys.exit(
                f"agent {self._settings.name} keeps the groups {names_of}, which need {needed} "
                "slots: start it with as many "
                "(NEXRL_SLOTS, nexrl up --slots)"
            )
        for group in mine:
            try:
                self._bring_back_one(group, kept[group.identifier])
            except Fenced as error:
                _log.warning("group.fenced identifier=%s %s", group.identifier, error)

    def _bring_back_one(self, group: GroupRecord, kept: Snapshot) -> None:
        identifier = group.identifier
        job = self._ledger.job(group.running_job) if group.running_job else None
        if job is not None and not job.final:
            if job.operation == DESTROY:
                self._ledger.groups.mark_destroyed(identifier, group.epoch)
                return
            cause = "the agent stopped while this ran; whether it took effect is not known"
            self._ledger.finish(
                job, error=ServiceError("OPERATION_FAILED", cause, identifier=identifier).body()
            )
        if not kept.accounts_for(group.seq, group.epoch):
            self._give_up(group, kept.seq)
            return
        if group.seq > kept.seq:
            group = self._without_dropped(group, kept.seq)
        placement = self._ledger.claim(
            names.AGENT_QUEUE, job_id=group.placement_job or "-", stale_before=time.time()
        )
        self._start(group, placement)

    def _give_up(self, group: GroupRecord, kept: int) -> None:
        epoch = self._start_epoch(group)
        cause = f"its processes were killed: {lost_operations(group.seq - kept)}"
        self._ledger.groups.mark_down(group.identifier, epoch, cause, kept=kept)

    def _without_dropped(self, group: GroupRecord, kept: int) -> GroupRecord:
        """Gradients that awaited optim_step ended with the ranks; before the new incarnation, for
        which nothing is dropped."""
        lost = self._ledger.groups.roll_back(group.identifier, group.epoch, kept)
        _log.warning(
            "gradients.lost identifier=%s: %d forward_backward are rolled_back",
            group.identifier,
            lost,
        )
        return group.model_copy(update={"seq": kept})

    def _folders(self, group: GroupRecord) -> GroupFolders:
        return GroupFolders(self._settings.data, group.identifier)

    # --- stopping ---

    def _stop_groups(self) -> None:
        """Every group ends after its current operation and keeps its state for the next start."""
        processes = list(self._running.values())
        for process in processes:
            _ask_to_stop(process)
        deadline = time.monotonic() + self._settings.stop_limit_s
        for process in processes:
            while not process.wait(max(0.0, min(BEAT_S, deadline - time.monotonic()))):
                self._show_slots()  # nobody may take the groups for lost meanwhile
                _ask_to_stop(process)
                if time.monotonic() >= deadline:
                    process.end(self._overdue(process.identifier))
                    break
        for watcher in self._watchers:
            watcher.join(timeout=WATCHER_END_S)

    def _overdue(self, identifier: str) -> str:
        """The cause of a group's end that had to be forced."""
        what = "its operation or the saving of its state"
        with contextlib.suppress(redis.exceptions.RedisError):
            group = self._ledger.groups.get(identifier)
            job = (
                self._ledger.job(group.running_job)
                if group is not None and group.running_job
                else None
            )
            what = job.operation if job is not None else "the saving of its state"
        return (
            f"the service was stopped, and {what} had not ended {self._settings.stop_limit_s} s "
            "later"
        )


def _ask_to_stop(process: GroupProcess) -> None:
    """May be repeated, and has to be where the disk is full."""
    try:
        process.request_stop()
    except OSError as error:
        _log.error("group.unstoppable identifier=%s %s", process.identifier, error)


def main() -> None:
    """Entry point."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    Agent(AgentSettings.from_env()).run()
