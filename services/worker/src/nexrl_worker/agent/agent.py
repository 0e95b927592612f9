"""The agent: ``python -m nexrl_worker.agent``. It offers slots, places groups on them, and tells
the ledger how they fare."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import redis
from nexrl_contract import names
from nexrl_contract.errors import ServiceError
from nexrl_contract.records import JobRecord, ProcessRecord
from nexrl_host.processes import rotate_logs
from nexrl_ledger import Fenced, Ledger, QueueConsumer, connect
from nexrl_payloads import open_store

from nexrl_worker.agent.launcher import LocalTorchrun, Slots
from nexrl_worker.agent.lifecycle import Host, Lifecycle, State
from nexrl_worker.settings import AgentSettings, GroupFolders

HEARTBEAT_S = 5.0
REPORT_END_S = 15.0
LEASE_S = 60.0
LOGS_KEPT = 20
LOGS_KEPT_S = 7 * 24 * 3600.0
_GONE = ".gone-"  # no identifier begins so
_log = logging.getLogger(__name__)


class Agent:
    """One host's slots. The main thread places groups; each has a thread for its life."""

    def __init__(self, settings: AgentSettings) -> None:
        self._settings = settings
        self._ledger = Ledger(connect(settings.redis_url))
        self._host = Host(
            settings,
            socket.gethostname(),
            self._ledger,
            open_store(settings.payloads),
            Slots(settings.slots, settings.gpus),
            LocalTorchrun,
        )
        self._lives: dict[str, Lifecycle] = {}
        """Groups that hold slots, by name."""
        self._begun: list[Lifecycle] = []
        """Those whose threads may still run: an end is told after the slots are free."""
        self._heartbeat_at = 0.0
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
        # Not heard before it has resumed its groups: one that cannot is not there.
        self._consumer.until_redis(self._resume_groups)
        self._consumer.until_redis(self._heartbeat)
        try:
            self._consumer.run()
        finally:  # also where this thread fails: the groups need not lose their weights with it
            self._stop_groups()
        with suppress(redis.exceptions.RedisError):
            self._ledger.agents.sign_off(self._settings.name)

    def _wake(self) -> None:
        if time.monotonic() - self._heartbeat_at >= HEARTBEAT_S:
            self._heartbeat()
            clear_staging(self._ledger, self._settings.data)
            clear_destroyed(self._ledger, self._settings.data, list(self._lives))
            for identifier in list(self._lives):
                logs = GroupFolders(self._settings.data, identifier).logs
                rotate_logs(logs, self._settings.log_bytes)
        self._place_waiting()

    def _heartbeat(self) -> None:
        self._heartbeat_at = time.monotonic()
        self._ledger.agents.beat(
            ProcessRecord(
                name=self._settings.name,
                host=self._host.address,
                device="cuda" if self._settings.gpus else "cpu",
                slots=self._settings.slots,
                free=self._host.slots.free,
                identifier=self._settings.identifier,
                pid=os.getpid(),
            )
        )

    def _show_slots(self) -> None:
        try:
            self._heartbeat()
        except redis.exceptions.RedisError:
            _log.warning("agent.heartbeat_missed")

    # --- placing ---

    def _place_waiting(self) -> None:
        """Claim every placement job that fits; say why the others wait."""
        for job in self._ledger.waiting(names.AGENT_QUEUE):
            foreign = self._settings.identifier not in (None, job.identifier)
            if foreign or job.identifier in self._lives:
                continue
            group = self._ledger.groups.get(job.identifier)
            if group is not None and (group.state == "destroyed" or group.placement_job != job.id):
                group = None  # or another of that name: its own job places it
            if group is not None and group.world_size > self._host.slots.free:
                shortage = self._host.slots.shortage(group.world_size, self._settings.name)
                self._ledger.explain_wait(job.id, shortage)
                continue
            # Race: another agent may want it, too. The claim decides; one that is stale was made by
            # an agent that is gone, since a living one renews it.
            stale = time.time() - LEASE_S
            claimed = self._ledger.claim(names.AGENT_QUEUE, job_id=job.id, stale_before=stale)
            if claimed is None:
                continue
            try:
                if group is None:
                    raise Fenced(f"group {job.identifier!r} is gone")
                self._begin(Lifecycle(self._host, group, claimed, self._release))
            except Fenced as error:
                _log.warning("placement.fenced job_id=%s %s", job.id, error)
                self._refuse(claimed)

    def _begin(self, life: Lifecycle) -> None:
        """Raises Fenced where the group is gone."""
        life.begin()
        self._lives[life.identifier] = life
        life.start()  # race: it may end and release the group before this returns
        self._begun = [*(one for one in self._begun if not one.join(0)), life]
        self._show_slots()

    def _refuse(self, placement: JobRecord) -> None:
        message = "the group was destroyed before it was started"
        error = ServiceError("GROUP_NOT_READY", message, identifier=placement.identifier).body()
        try:
            self._consumer.until_redis(lambda: self._ledger.finish(placement, error=error))
        except Fenced as replaced:
            _log.warning("placement.fenced job_id=%s %s", placement.id, replaced)

    def _release(self, life: Lifecycle) -> None:
        """Its processes are gone. Called from the group's own thread."""
        self._lives.pop(life.identifier, None)
        self._show_slots()

    # --- coming back, and stopping ---

    def _resume_groups(self) -> None:
        """Groups that this agent held before it was restarted: start them again, or say what was
        lost. May be repeated."""
        mine = [
            Lifecycle(self._host, group, None, self._release)
            for group in self._ledger.groups.living()
            if group.leader == self._settings.name
            and group.state in ("starting", "up", "ready")
            and group.identifier not in self._lives
        ]
        whole = [life for life in mine if life.whole]
        needed = sum(life.world_size for life in whole)
        if needed > self._host.slots.free:
            sys.exit(
                f"agent {self._settings.name} keeps the groups "
                f"{', '.join(life.identifier for life in whole)}, which need {needed} slots: start "
                "it with as many (NEXRL_SLOTS, nexrl up --slots)"
            )
        for life in mine:
            try:
                if life.resume() is State.STARTING:
                    self._begin(life)
            except Fenced as error:
                _log.warning("group.fenced identifier=%s %s", life.identifier, error)

    def _stop_groups(self) -> None:
        """Every group ends after its current operation and keeps its state for the next start."""
        lives = [life for life in self._begun if not life.join(0)]
        deadline = time.monotonic() + self._settings.stop_limit_s
        for life in lives:
            life.stop(deadline)
        for life in lives:
            while self._lives.get(life.identifier) is life and not life.join(HEARTBEAT_S):
                self._show_slots()  # nobody may take the groups for lost meanwhile
        for life in lives:
            life.join(REPORT_END_S)  # Redis may be away, and the end unsaid


def clear_staging(ledger: Ledger, data: Path) -> None:
    """Remove what saves that have ended left in staging: their ranks died before they could hand
    over."""
    for folder in (data / ".nexrl" / "staging").glob("*"):
        job = ledger.job(folder.name)
        if job is None or job.final:
            shutil.rmtree(folder, ignore_errors=True)


def clear_destroyed(ledger: Ledger, data: Path, running: Collection[str]) -> None:
    """Remove what destroyed groups left: their state at once, logs beyond the last ``LOGS_KEPT``
    groups or after a week.

    A state is removed only where Redis itself says that its group was destroyed, not where it knows
    nothing.
    """
    for folder in (data / ".nexrl" / "groups").glob("*"):
        group = None if folder.name in running else ledger.groups.get(folder.name)
        if folder.name.startswith(_GONE) or (group is not None and group.state == "destroyed"):
            _remove_aside(folder)
    logs = list((data / ".nexrl" / "logs" / "groups").glob("*"))
    # Race: a group may be made meanwhile. Read after the folders, the living contain every group
    # whose folder was seen.
    living = {*ledger.groups.identifiers(), *running}
    ended = [(_last_written(folder), folder) for folder in logs if folder.name not in living]
    for number, (written, folder) in enumerate(sorted(ended, reverse=True)):
        if number >= LOGS_KEPT or time.time() - written > LOGS_KEPT_S:
            _remove_aside(folder)


def _remove_aside(folder: Path) -> None:
    """Race: another agent may be given the next group of that name while we remove. The name is
    free at once, since the folder is renamed first."""
    aside = folder if folder.name.startswith(_GONE) else folder.with_name(_GONE + folder.name)
    with suppress(OSError):
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _last_written(folder: Path) -> float:
    """Seconds since the epoch; 0 for what is being removed."""
    if not folder.name.startswith(_GONE):
        with suppress(OSError):
            return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    return 0.0


def main() -> None:
    """Entry point."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    Agent(AgentSettings.from_env()).run()
