"""One group under watch: from the start of its processes to their end, and what the ledger is told
of it."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from nexrl_contract import names
from nexrl_contract.errors import ServiceError
from nexrl_contract.operations import DESTROY
from nexrl_contract.records import GroupRecord, JobRecord
from nexrl_ledger import Fenced, Ledger, until_redis
from nexrl_payloads import PayloadStore

from nexrl_worker.agent.launcher import Failure, GroupProcess
from nexrl_worker.snapshot import lost_operations, read_snapshot

WATCH_S = 0.1
RENEW_S = 5.0
LOGS_KEPT = 20
LOGS_KEPT_S = 7 * 24 * 3600.0
_GONE = ".gone-"  # no identifier begins so
_log = logging.getLogger(__name__)


class GroupWatch:
    """Runs in a thread of its own. However it ends, the processes are gone and ``release`` was
    called once."""

    def __init__(
        self,
        ledger: Ledger,
        store: PayloadStore,
        process: GroupProcess,
        placement: JobRecord | None,
        release: Callable[[GroupProcess], None],
    ) -> None:
        self._ledger = ledger
        self._store = store
        self._process = process
        self._unanswered = placement
        self._release = release
        self._ended = False

    def run(self) -> None:
        """Watch until the group's processes have ended; never raises."""
        try:
            refusal = self._await_up() if self._unanswered is not None else None
            if refusal is not None:
                self._turn_away(refusal)
            else:
                self._conclude(self._await_end())
        except Fenced as error:
            _log.warning("group.fenced identifier=%s %s", self._process.identifier, error)
        except Exception as error:
            _log.exception("group.lost identifier=%s", self._process.identifier)
            self._give_up(error)
        finally:
            self._end()

    def _await_up(self) -> dict[str, Any] | None:
        """Answer the placement job as soon as the ranks have met; the error of models that none of
        them can run."""
        renewed = time.monotonic()
        while not self._process.ended_cleanly and self._process.poll_failure() is None:
            checked = self._process.checked  # before its word is looked for
            if (refusal := self._process.refusal) is not None:
                return refusal
            group = until_redis(lambda: self._ledger.groups.get(self._process.identifier))
            if (
                checked
                and group is not None
                and group.epoch == self._process.epoch
                and group.state in ("up", "ready")
            ):
                self._answer(result=_placed(group))
                return None
            if time.monotonic() - renewed > RENEW_S:
                self._renew()
                renewed = time.monotonic()
            time.sleep(WATCH_S)
        return None

    def _turn_away(self, refusal: dict[str, Any]) -> None:
        """The group is gone as if it had been destroyed, so that its name is free for other
        settings."""
        identifier, epoch = self._process.identifier, self._process.epoch
        self._end()
        doomed = until_redis(lambda: self._ledger.waiting(names.train_queue(identifier)))
        self._process.forget_state()
        until_redis(lambda: self._ledger.groups.mark_destroyed(identifier, epoch))
        _log.warning(
            "group.refused identifier=%s epoch=%d %s", identifier, epoch, refusal["message"]
        )
        self._answer(error={**refusal, "identifier": identifier})
        self._drop_payloads(doomed)

    def _await_end(self) -> Failure | None:
        """Why the processes ended, None after a stop or a destroy."""
        while not self._process.ended_cleanly:
            if (failure := self._process.poll_failure()) is not None:
                return failure
            time.sleep(WATCH_S)
        return None

    def _conclude(self, failure: Failure | None) -> None:
        """Slots are free before anybody hears of the end; the placement is answered after the
        group's state is true."""
        identifier, epoch = self._process.identifier, self._process.epoch
        destroy = self._process.destroy_job()
        self._end()
        doomed = until_redis(lambda: self._ledger.waiting(names.train_queue(identifier)))
        if destroy is None and failure is not None:
            destroy = next((job.id for job in doomed if job.operation == DESTROY), None)
        cause = failure.cause if failure is not None else None
        if destroy is not None:
            self._process.forget_state()
            until_redis(lambda: self._ledger.groups.mark_destroyed(identifier, epoch, cause=cause))
            _log.info("group.destroyed identifier=%s epoch=%d", identifier, epoch)
        elif failure is not None:
            kept = read_snapshot(self._process.folders.state).seq
            cause = failure.cause + self._lost(kept)
            _log.error("group.down identifier=%s epoch=%d %s", identifier, epoch, cause)
            until_redis(
                lambda: self._ledger.groups.mark_down(
                    identifier, epoch, cause, rank=failure.rank, kept=kept
                )
            )
        else:
            until_redis(lambda: self._ledger.groups.update(identifier, epoch, state="starting"))
            doomed = []
        self._refuse(cause or "the ranks were stopped before they had met")
        self._drop_payloads(doomed)

    def _lost(self, kept: int) -> str:
        """How a cause says what only the dead ranks held; empty where nothing was lost."""
        group = until_redis(lambda: self._ledger.groups.get(self._process.identifier))
        return (
            "" if group is None or group.seq <= kept else f"; {lost_operations(group.seq - kept)}"
        )

    def _give_up(self, error: Exception) -> None:
        self._end()
        cause = f"the agent could not watch it any more: {type(error).__name__}: {error}"
        try:
            until_redis(
                lambda: self._ledger.groups.mark_down(
                    self._process.identifier, self._process.epoch, cause
                )
            )
            self._refuse(cause)
        except Exception:
            _log.exception("group.unreported identifier=%s", self._process.identifier)

    def _refuse(self, cause: str) -> None:
        message = f"the group did not start: {cause}"
        self._answer(
            error=ServiceError(
                "OPERATION_FAILED", message, identifier=self._process.identifier
            ).body()
        )

    def _answer(self, **ending: Any) -> None:
        """End the placement job, if it has not ended."""
        if (placement := self._unanswered) is not None:
            until_redis(lambda: self._ledger.finish(placement, **ending))
            self._unanswered = None

    def _renew(self) -> None:
        if (placement := self._unanswered) is not None:
            until_redis(lambda: self._ledger.renew(placement))

    def _drop_payloads(self, jobs: list[JobRecord]) -> None:
        for job in jobs:
            if job.payload is not None:
                try:
                    self._store.delete(job.payload.id)
                except ServiceError as error:  # the janitor will find it
                    _log.warning("payload.kept job_id=%s %s", job.id, error)

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._process.kill()
            self._release(self._process)


def _placed(group: GroupRecord) -> dict[str, Any]:
    """The result of ``initialize_worker``."""
    return {
        "role": group.role,
        "world_size": group.world_size,
        "ignored": group.ignored,
        "already": False,
    }


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
    living = {
        *ledger.groups.identifiers(),
        *running,
    }  # read after the folders, or a new group's would be taken for an old one
    ended = [(_last_written(folder), folder) for folder in logs if folder.name not in living]
    for number, (written, folder) in enumerate(sorted(ended, reverse=True)):
        if number >= LOGS_KEPT or time.time() - written > LOGS_KEPT_S:
            _remove_aside(folder)


def _remove_aside(folder: Path) -> None:
    """At once for whoever makes a folder of that name: another agent may have been given the next
    group."""
    aside = folder if folder.name.startswith(_GONE) else folder.with_name(_GONE + folder.name)
    with contextlib.suppress(OSError):
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _last_written(folder: Path) -> float:
    """Seconds since the epoch; 0 for what is being removed."""
    if not folder.name.startswith(_GONE):
        with contextlib.suppress(OSError):
            return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    return 0.0
