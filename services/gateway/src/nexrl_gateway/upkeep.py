"""What the gateway does on its own: it looks for work that nobody takes and for a Redis that has
forgotten what it held, sweeps what nobody needs any more, and ends groups whose agent is gone."""

from __future__ import annotations

import contextlib
import json
import logging
import time
import uuid
from collections.abc import Hashable, Iterable, Iterator
from datetime import datetime
from pathlib import Path

import redis
from nexrl_contract import names
from nexrl_contract.records import GroupRecord
from nexrl_ledger import Fenced, Ledger
from nexrl_payloads import RESULT_SUFFIX, PayloadStore
from nexrl_storage.manifest import write_file

from nexrl_gateway.settings import Settings
from nexrl_gateway.strict_json import JSON

WATCH_PERIOD_S = 5.0
QUIET_S = 20.0
"""Idle consumers take a job within milliseconds; one that has waited so long before them is not
being taken."""
SWEEP_PERIOD_S = 60.0
PATIENCE_S = 150.0
"""A stack that starts again has so long to bring its groups back."""
_log = logging.getLogger(__name__)


class _Since:
    """Since when each thing of the last look has been there without a break."""

    def __init__(self) -> None:
        self._first: dict[Hashable, float] = {}

    def seen(self, keys: Iterable[Hashable]) -> None:
        """One look: these are there, others are forgotten."""
        now = time.monotonic()
        self._first = {key: self._first.get(key, now) for key in keys}

    def seconds(self, key: Hashable) -> float:
        """How long ``key`` of the last look has been there."""
        return time.monotonic() - self._first[key]


class Watch:
    """Looks at the queues and at Redis' mark; :meth:`stuck` and :meth:`emptied` say what is
    wrong."""

    def __init__(self, ledger: Ledger, folder: Path) -> None:
        """The mark of the Redis that was seen last is kept in ``folder``, for the next gateway."""
        self._ledger = ledger
        self._file = folder / "ledger.json"
        self._seen: JSON = {}
        with contextlib.suppress(OSError, ValueError):
            self._seen = json.loads(self._file.read_text())
        self._since = _Since()
        self._stuck: list[str] = []

    def look(self) -> None:
        """One look; raises RedisError, after which :meth:`forget` is due."""
        self.emptied()
        idle = dict(self._idle())
        self._since.seen(idle)
        self._stuck = [
            f"{what} for more than {QUIET_S:g} s"
            for key, what in idle.items()
            if self._since.seconds(key) >= QUIET_S
        ]

    def forget(self) -> None:
        """Begin anew: while Redis was away nobody could take anything."""
        self._since.seen(())

    def stuck(self) -> list[str]:
        """Jobs that wait before an idle consumer, as of the last look."""
        return self._stuck

    def emptied(self) -> str | None:
        """That Redis has lost what it held, until a group has been made since; raises
        RedisError."""
        mark = self._mark()
        if "emptied" in mark and self._ledger.groups.identifiers():
            del mark["emptied"]
            self._write(mark, only_new=False)
        if mark != {name: value for name, value in self._seen.items() if name != "at"}:
            with contextlib.suppress(OSError):
                self._file.parent.mkdir(parents=True, exist_ok=True)
                write_file(
                    self._file.parent,
                    self._file.name,
                    json.dumps({**mark, "at": time.time()}).encode(),
                )
        self._seen = {**mark, "at": time.time()}
        return mark.get("emptied")

    def _mark(self) -> JSON:
        """Redis' mark, made where it has none; ``emptied`` says that there was another one
        before."""
        known = self._seen.get("id")
        mark = self._read()
        if mark is None:
            fresh = {"id": uuid.uuid4().hex, **self._emptied(known)}
            self._write(fresh, only_new=True)
            mark = self._read() or fresh  # another gateway may have written its own in between
        if known not in (None, mark["id"]) and "emptied" not in mark:
            mark |= self._emptied(known)
        return mark

    def _emptied(self, known: str | None) -> dict[str, str]:
        if known is None:
            return {}
        seen = datetime.fromtimestamp(self._seen["at"]).isoformat(sep=" ", timespec="seconds")
        reason = (
            f"Redis was emptied, or replaced by another one, after {seen}: it has forgotten all "
            "groups and jobs; initialise the groups again and load their checkpoints"
        )
        _log.error("redis.emptied %s", reason)
        return {"emptied": reason}

    def _read(self) -> JSON | None:
        text = self._ledger.mark()
        mark: JSON | None = json.loads(text) if text else None
        return mark

    def _write(self, mark: JSON, *, only_new: bool) -> None:
        with contextlib.suppress(redis.exceptions.ResponseError):  # it takes no writes now
            self._ledger.set_mark(json.dumps(mark), only_new=only_new)

    def _idle(self) -> Iterator[tuple[tuple[str, str], str]]:
        """The oldest job of each queue whose consumer is there and does nothing, and what to say of
        it."""
        for group in self._ledger.groups.living():
            if group.state in ("up", "ready") and group.running_job is None:
                idle = f"group {group.identifier} is {group.state} and idle, but takes no work"
                yield from self._untaken(names.train_queue(group.identifier), idle)
        if self._ledger.agents.heard():
            yield from self._untaken(names.AGENT_QUEUE, "no agent takes what is to be placed")
        if self._ledger.checkpointers.heard():
            idle = "no checkpointer takes what is to be published"
            yield from self._untaken(names.CHECKPOINT_QUEUE, idle)

    def _untaken(self, queue: str, what: str) -> Iterator[tuple[tuple[str, str], str]]:
        jobs = self._ledger.waiting(queue)
        if jobs and not any(job.state == "running" or job.waits_for for job in jobs):
            yield (queue, jobs[0].id), f"{what}: {jobs[0].operation} (job {jobs[0].id}) has waited"


def sweep_period_s(settings: Settings) -> float:
    """A minute, or half of the shortest time that something is kept."""
    kept = (settings.result_kept_s, settings.upload_kept_s, settings.jobs_kept_s)
    return min(SWEEP_PERIOD_S, *(seconds / 2 for seconds in kept))


def sweep(settings: Settings, ledger: Ledger, store: PayloadStore) -> list[str]:
    """Remove payloads and records that nobody needs any more, unless another replica has just done
    so; the ids of the payloads removed."""
    if not ledger.retention.may_sweep(sweep_period_s(settings)):
        return []
    # A payload that is stored after this look is spared by its age.
    in_use = ledger.payloads_in_use()
    removed = store.sweep(
        in_use, result_age_s=names.RESULT_TTL_S, upload_age_s=settings.upload_kept_s
    )
    dropped = ledger.retention.drop_finished(settings.jobs_kept, settings.jobs_kept_s)
    groups = ledger.retention.drop_destroyed(settings.jobs_kept_s)
    # No reader begins on a due result any more.
    due = ledger.retention.take_due_results(settings.result_kept_s)
    for job_id in due:
        store.delete(f"{job_id}{RESULT_SUFFIX}")
    ledger.retention.forget_results(due)
    if removed or dropped or groups or due:
        swept = (len(removed), dropped, groups, len(due))
        _log.info("janitor.swept payloads=%d jobs=%d groups=%d results=%d", *swept)
    return removed


class LostGroups:
    """Takes down groups that it has seen silent for ``patience_s``."""

    def __init__(self, ledger: Ledger, patience_s: float = PATIENCE_S) -> None:
        self._ledger = ledger
        self._patience_s = patience_s
        self._silent = _Since()

    def look(self) -> list[str]:
        """One look; the identifiers of groups that it took down. Raises RedisError, after which
        :meth:`forget` is due."""
        heard = {agent.name for agent in self._ledger.agents.heard()}
        silent = [group for group in self._ledger.groups.living() if self._is_silent(group, heard)]
        self._silent.seen((group.identifier, group.epoch) for group in silent)
        return [group.identifier for group in silent if self._end(group, heard)]

    def forget(self) -> None:
        """Begin anew: while Redis was away nobody could be heard."""
        self._silent.seen(())

    def _is_silent(self, group: GroupRecord, heard: set[str]) -> bool:
        quiet_s = time.time() - (group.heartbeat or group.created_at)
        alive = group.state in ("starting", "up", "ready")
        away = not group.placement or bool(group.unheard(heard))
        return alive and away and quiet_s > self._patience_s

    def _end(self, group: GroupRecord, heard: set[str]) -> bool:
        if self._silent.seconds((group.identifier, group.epoch)) < self._patience_s:
            return False
        silent = ", ".join(group.unheard(heard)) or "(none is known)"
        cause = (
            f"agent {silent} has not been heard for {self._patience_s:g} s; its ranks and "
            "their weights are taken for lost"
        )
        try:
            self._ledger.groups.mark_down(group.identifier, group.epoch, cause)
        except Fenced:  # an agent has started it anew since the look: a later epoch
            return False
        _log.error(
            "group.lost identifier=%s epoch=%d agent=%s", group.identifier, group.epoch, silent
        )
        return True
