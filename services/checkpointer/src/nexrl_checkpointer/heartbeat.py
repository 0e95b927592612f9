"""Tells the ledger, from a thread of its own, that this checkpointer lives and works on its job."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import redis
from nexrl_contract.records import JobRecord, ProcessRecord
from nexrl_ledger import Fenced, Ledger

BEAT_S = 5.0
LEASE_S = 30.0
_log = logging.getLogger(__name__)


class Heartbeat:
    """Beats every five seconds, and renews the lease of the job in :meth:`holding` with each
    beat."""

    def __init__(self, ledger: Ledger, name: str) -> None:
        self._ledger = ledger
        self._name = name
        self._job: JobRecord | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin; the first beat is sent at once."""
        self._thread.start()

    def stop(self) -> None:
        """No beat comes after this."""
        self._done.set()
        self._thread.join()

    @contextmanager
    def holding(self, job: JobRecord) -> Iterator[None]:
        """Keep the lease of ``job`` meanwhile."""
        self._job = job
        try:
            yield
        finally:
            self._job = None

    def check_claim(self, job: JobRecord) -> None:
        """Raises Fenced when another checkpointer has taken ``job`` over."""
        current = self._ledger.job(job.id)
        if current is None or current.attempt != job.attempt or current.final:
            raise Fenced(f"job {job.id} attempt {job.attempt} has been replaced")

    def _run(self) -> None:
        while True:
            job = self._job
            try:
                self._beat(job)
            except (redis.exceptions.RedisError, Fenced) as error:
                _log.warning("heartbeat.missed reason=%s", error)
            if self._done.wait(BEAT_S):
                return

    def _beat(self, job: JobRecord | None) -> None:
        record = ProcessRecord(
            name=self._name,
            host=socket.gethostname(),
            slots=1,
            free=0 if job else 1,
            pid=os.getpid(),
        )
        self._ledger.checkpointers.beat(record)
        if job is not None:
            self.check_claim(job)
            self._ledger.renew(job)
