"""The agent: ``python -m nexrl_worker.agent``. It offers slots, places groups on them, and tells the ledger how they fare."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import threading
import time
from typing import Any

import redis
from nexrl_contract import names
from nexrl_contract.errors import ServiceError
from nexrl_contract.records import AgentRecord, GroupRecord, JobRecord
from nexrl_ledger import Fenced, Ledger, ResidentWorker, connect, until_redis
from nexrl_payloads import open_store

from nexrl_worker.group_process import GroupProcess
from nexrl_worker.settings import AgentSettings, GroupFolders
from nexrl_worker.slots import Slots
from nexrl_worker.suspended import suspended_seq

BEAT_S = 5.0
WATCH_S = 0.1
STOP_LIMIT_S = 50.0
LEASE_S = 60.0
_log = logging.getLogger(__name__)


class Agent:
    """One host's slots. Groups are started in the main thread and watched each in a thread of its own."""

    def __init__(self, settings: AgentSettings) -> None:
        self._settings = settings
        self._ledger = Ledger(connect(settings.redis_url))
        self._store = open_store(settings.payloads)
        self._slots = Slots(settings.slots, settings.gpus)
        self._running: dict[str, GroupProcess] = {}
        self._watchers: list[threading.Thread] = []
        self._beat_at = 0.0
        self._worker = ResidentWorker(
            names.AGENT_QUEUE,
            connect(settings.redis_url, decode=False, timeout_s=None),
            name=f"agent-{settings.name}",
            on_bell=lambda _: self._place_waiting(),
            on_tick=self._tick,
        )

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then stop the groups so that they can come back."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._worker.stop())
        until_redis(self._beat)
        until_redis(self._bring_back)
        until_redis(self._clear_staging)
        self._worker.run()
        self._stop_groups()
        self._ledger.sign_off(self._settings.name)

    # --- placing ---

    def _tick(self) -> None:
        if time.monotonic() - self._beat_at >= BEAT_S:
            self._beat()
        self._place_waiting()

    def _beat(self) -> None:
        self._beat_at = time.monotonic()
        self._ledger.beat(
            AgentRecord(
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
            group = self._ledger.group(job.identifier)
            if (
                group is None
                or job.identifier in self._running
                or self._settings.identifier not in (None, job.identifier)
            ):
                continue
            if group.world_size > self._slots.free:
                self._ledger.explain_wait(job.id, self._slots.shortage(group.world_size, self._settings.name))
            elif (
                claimed := self._ledger.claim(names.AGENT_QUEUE, job_id=job.id, stale_before=time.time() - LEASE_S)
            ) is not None:
                self._start(group, claimed)

    def _bring_back(self) -> None:
        """Groups that this agent held before it was restarted: start them again, or say what was lost."""
        for group in self._ledger.groups():
            if group.agent != self._settings.name or group.state not in ("starting", "up", "ready"):
                continue
            if group.running_job and (job := self._ledger.job(group.running_job)) is not None and not job.final:
                cause = "the agent stopped while this ran; whether it took effect is not known"
                self._ledger.finish(
                    job, error=ServiceError("OPERATION_FAILED", cause, identifier=group.identifier).body()
                )
            kept = suspended_seq(GroupFolders(self._settings.data, group.identifier).state)
            if group.seq > kept:
                self._give_up(group, kept)
            else:
                placement = self._ledger.claim(
                    names.AGENT_QUEUE, job_id=group.placement_job or "-", stale_before=time.time()
                )
                self._start(group, placement)

    def _clear_staging(self) -> None:
        """Remove what saves that have ended left in staging: their ranks died before they could hand over."""
        for folder in (self._settings.data / ".nexrl" / "staging").glob("*"):
            job = self._ledger.job(folder.name)
            if job is None or job.final:
                shutil.rmtree(folder, ignore_errors=True)

    def _give_up(self, group: GroupRecord, kept: int) -> None:
        epoch = self._ledger.start_epoch(group.identifier, self._settings.name, [])
        lost = self._ledger.roll_back(group.identifier, epoch, kept)
        self._ledger.group_down(
            group.identifier,
            epoch,
            f"its processes were killed and {lost} finished operations that changed the weights went with them (now rolled_back); "
            "destroy the group, initialise it again and load a checkpoint",
        )

    def _start(self, group: GroupRecord, placement: JobRecord | None) -> None:
        slots = self._slots.take(group.world_size)
        epoch = self._ledger.start_epoch(group.identifier, self._settings.name, [socket.gethostname()])
        process = GroupProcess(self._settings, group, epoch, slots)
        self._running[group.identifier] = process
        _log.info("group.started identifier=%s epoch=%d world_size=%d", group.identifier, epoch, group.world_size)
        self._beat()
        watcher = threading.Thread(
            target=self._watch, args=(process, placement), name=f"watch-{group.identifier}", daemon=True
        )
        self._watchers.append(watcher)
        watcher.start()

    # --- watching (one thread a group) ---

    def _watch(self, process: GroupProcess, placement: JobRecord | None) -> None:
        try:
            if placement is not None:
                self._await_up(process, placement)
            while process.poll_failure() is None and not process.ended_cleanly:
                time.sleep(WATCH_S)
            self._ended(process)
        except Fenced as error:
            _log.warning("group.fenced identifier=%s %s", process.identifier, error)
            process.kill()
            self._free(process)

    def _await_up(self, process: GroupProcess, placement: JobRecord) -> None:
        """Answer the placement job as soon as the ranks have met."""
        while process.poll_failure() is None and not process.ended_cleanly:
            group = until_redis(lambda: self._ledger.group(process.identifier))
            if group is not None and group.epoch == process.epoch and group.state in ("up", "ready"):
                self._answer(placement, _placed(group))
                return
            until_redis(lambda: self._ledger.renew(placement))
            time.sleep(WATCH_S)
        failure = process.poll_failure()
        cause = failure[0] if failure else "the ranks were stopped before they had met"
        error = ServiceError("OPERATION_FAILED", f"the group did not start: {cause}", identifier=process.identifier)
        until_redis(lambda: self._ledger.finish(placement, error=error.body()))

    def _answer(self, placement: JobRecord, result: dict[str, Any]) -> None:
        until_redis(lambda: self._ledger.finish(placement, result=result))

    def _ended(self, process: GroupProcess) -> None:
        destroy_job = process.destroy_job()
        failure = process.poll_failure()
        process.kill()
        self._free(process)
        identifier, epoch = process.identifier, process.epoch
        doomed = until_redis(lambda: self._ledger.waiting(names.train_queue(identifier)))
        if destroy_job is not None:
            until_redis(lambda: self._destroyed(identifier, epoch, destroy_job))
        elif failure is not None:
            cause, rank = failure
            _log.error("group.down identifier=%s epoch=%d %s", identifier, epoch, cause)
            until_redis(lambda: self._ledger.group_down(identifier, epoch, cause, rank=rank))
            until_redis(self._clear_staging)
        else:
            until_redis(lambda: self._ledger.update_group(identifier, epoch, state="starting"))
            return
        for job in doomed:
            if job.payload is not None:
                self._store.delete(job.payload.id)

    def _destroyed(self, identifier: str, epoch: int, job_id: str) -> None:
        self._ledger.group_destroyed(identifier, epoch, spare_job=job_id)
        job = self._ledger.job(job_id)
        if job is not None:
            self._ledger.finish(job, result={})
        _log.info("group.destroyed identifier=%s epoch=%d", identifier, epoch)

    def _free(self, process: GroupProcess) -> None:
        self._slots.give_back(process.world_size, process.gpus)
        self._running.pop(process.identifier, None)
        try:
            self._beat()
        except redis.exceptions.RedisError:
            _log.warning("agent.beat_missed")

    # --- stopping ---

    def _stop_groups(self) -> None:
        """Every group ends after its current operation and keeps its state for the next start."""
        processes = list(self._running.values())
        for process in processes:
            process.request_stop()
        deadline = time.monotonic() + STOP_LIMIT_S
        for process in processes:
            if not process.wait(max(0.1, deadline - time.monotonic())):
                _log.error("group.killed identifier=%s: it did not stop within %d s", process.identifier, STOP_LIMIT_S)
                process.kill()
        for watcher in self._watchers:
            watcher.join(timeout=5.0)


def _placed(group: GroupRecord) -> dict[str, Any]:
    """The result of ``initialize_worker``."""
    return {"role": group.role, "world_size": group.world_size, "ignored": group.ignored, "already": False}


def main() -> None:
    """Entry point."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    Agent(AgentSettings.from_env()).run()


if __name__ == "__main__":
    main()
