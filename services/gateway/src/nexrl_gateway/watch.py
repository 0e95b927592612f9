"""What only shows over time: work that nobody takes though it could, and a Redis that has forgotten
what it held."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import redis
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from nexrl_contract import names
from nexrl_ledger import Ledger
from nexrl_storage.files import write_file

PERIOD_S = 5.0
QUIET_S = 20.0
"""Idle consumers take a job within milliseconds; one that has waited so long before them is not
being taken."""
_log = logging.getLogger(__name__)


class Watch:
    """Looks at the queues and at Redis' mark again and again; :meth:`reasons` says what is
    wrong."""

    def __init__(self, ledger: Ledger, folder: Path) -> None:
        """The mark of the Redis that was seen last is kept in ``folder``, for the next gateway."""
        self._ledger = ledger
        self._file = folder / "ledger.json"
        self._seen: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            self._seen = json.loads(self._file.read_text())
        self._since: dict[tuple[str, str], float] = {}
        self._stuck: list[str] = []

    async def run(self, threads: CapacityLimiter) -> None:
        """Look once a period until cancelled."""
        while True:
            try:
                await run_sync(self.look, limiter=threads)
            except redis.exceptions.RedisError as error:
                self._since.clear()  # nobody could take anything meanwhile
                _log.warning("watch.failed error=%s", error)
            await asyncio.sleep(PERIOD_S)

    def look(self) -> None:
        """One look; raises RedisError."""
        self.emptied()
        now, idle = time.monotonic(), dict(self._idle())
        self._since = {key: self._since.get(key, now) for key in idle}
        self._stuck = [
            f"{idle[key]} for more than {QUIET_S:g} s"
            for key, at in self._since.items()
            if now - at >= QUIET_S
        ]

    def stuck(self) -> list[str]:
        """Jobs that wait before an idle consumer, as of the last look."""
        return self._stuck

    def emptied(self) -> str | None:
        """That Redis has lost what it held, until a group has been made since; raises
        RedisError."""
        mark = self._mark()
        if "emptied" in mark and self._ledger.identifiers():
            mark = {name: value for name, value in mark.items() if name != "emptied"}
            self._write(mark, only_new=False)
        if mark != {name: value for name, value in self._seen.items() if name != "at"}:
            with contextlib.suppress(OSError):
                self._file.parent.mkdir(parents=True, exist_ok=True)
                write_file(self._file, json.dumps({**mark, "at": time.time()}).encode())
        self._seen = {**mark, "at": time.time()}
        return mark.get("emptied")

    def _mark(self) -> dict[str, Any]:
        """Redis' mark, made where it has none; ``emptied`` says that there was another one
        before."""
        known = self._seen.get("id")
        mark = self._read()
        if mark is None:
            fresh = {"id": uuid.uuid4().hex, **self._emptied(known)}
            self._write(fresh, only_new=True)
            mark = self._read() or fresh
        if known not in (None, mark["id"]) and "emptied" not in mark:
            mark |= self._emptied(known)
        return mark

    def _emptied(self, known: str | None) -> dict[str, str]:
        if known is None:
            return {}
        seen = datetime.fromtimestamp(self._seen["at"]).isoformat(sep=" ", timespec="seconds")
        reason = (
            f"Redis was emptied, or replaced by another one, after {seen}: it has forgotten all "
            "groups and jobs; "
            "initialise the groups again and load their checkpoints"
        )
        _log.error("redis.emptied %s", reason)
        return {"emptied": reason}

    def _read(self) -> dict[str, Any] | None:
        text = self._ledger.mark()
        mark: dict[str, Any] | None = json.loads(text) if text else None
        return mark

    def _write(self, mark: dict[str, Any], *, only_new: bool) -> None:
        with contextlib.suppress(redis.exceptions.ResponseError):  # it takes no writes now
            self._ledger.set_mark(json.dumps(mark), only_new=only_new)

    def _idle(self) -> Iterator[tuple[tuple[str, str], str]]:
        """The oldest job of each queue whose consumer is there and does nothing, and what to say of
        it."""
        for group in self._ledger.groups():
            if group.state in ("up", "ready") and group.running_job is None:
                queue = names.train_queue(group.identifier)
                yield from self._untaken(
                    queue, f"group {group.identifier} is {group.state} and idle, but takes no work"
                )
        if self._ledger.agents():
            yield from self._untaken(names.AGENT_QUEUE, "no agent takes what is to be placed")
        if self._ledger.checkpointers():
            yield from self._untaken(
                names.CHECKPOINT_QUEUE, "no checkpointer takes what is to be published"
            )

    def _untaken(self, queue: str, what: str) -> Iterator[tuple[tuple[str, str], str]]:
        jobs = self._ledger.waiting(queue)
        if jobs and not any(job.state == "running" or job.waits_for for job in jobs):
            yield (queue, jobs[0].id), f"{what}: {jobs[0].operation} (job {jobs[0].id}) has waited"
