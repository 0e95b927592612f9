"""The checkpointer's loop: take a save off the queue, publish it, say how it ended."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import redis
from nexrl_contract.errors import ServiceError
from nexrl_contract.names import CHECKPOINT_QUEUE, DEFAULT_REDIS_URL
from nexrl_contract.records import JobRecord
from nexrl_ledger import Fenced, Ledger, QueueConsumer, connect
from nexrl_storage.manifest import Manifest
from nexrl_storage.protocol import full_disk

from nexrl_checkpointer.heartbeat import LEASE_S, Heartbeat
from nexrl_checkpointer.publish import PublishRequest, discard, publish
from nexrl_checkpointer.retention import replace_previous

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment says. ``data`` is the absolute data folder; ``name`` is unique among
    living checkpointers."""

    redis_url: str
    data: Path
    name: str

    @classmethod
    def from_env(cls) -> Self:
        """Every variable has a default."""
        return cls(
            redis_url=os.environ.get("NEXRL_REDIS_URL", DEFAULT_REDIS_URL),
            data=Path(os.environ.get("NEXRL_DATA", "data")).absolute(),
            name=os.environ.get("NEXRL_CHECKPOINTER_NAME")
            or f"{socket.gethostname()}-{os.getpid()}",
        )


class Checkpointer:
    """Runs in the main thread until :meth:`stop`; one job at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._ledger = Ledger(connect(settings.redis_url))
        self._heartbeat = Heartbeat(Ledger(connect(settings.redis_url)), settings.name)
        self._consumer = QueueConsumer(
            settings.redis_url,
            CHECKPOINT_QUEUE,
            name=f"checkpointer-{settings.name}",
            on_wake=self._drain,
        )

    def run(self) -> None:
        """Consume until stopped; waits wherever Redis is away."""
        _log.info("checkpointer.started name=%s data=%s", self._settings.name, self._settings.data)
        self._heartbeat.start()
        try:
            self._consumer.run()
        finally:
            self._heartbeat.stop()
            with contextlib.suppress(redis.exceptions.RedisError):
                self._ledger.checkpointers.sign_off(self._settings.name)

    def stop(self) -> None:
        """Finish the current job, then return from :meth:`run`."""
        self._consumer.stop()

    def _drain(self) -> None:
        """Groups side by side, the saves of one group in their order: "previous" means the one
        before."""
        taken: set[str] = set()
        self._ledger.checkpoints.forget_destroyed()
        for waiting in self._ledger.waiting(CHECKPOINT_QUEUE):
            if self._consumer.stopping:
                return
            if waiting.identifier in taken:
                continue
            stale = time.time() - LEASE_S
            job = self._ledger.claim(CHECKPOINT_QUEUE, job_id=waiting.id, stale_before=stale)
            if job is None or not self._run(job):
                taken.add(waiting.identifier)

    def _run(self, job: JobRecord) -> bool:
        """False when another checkpointer took the job over."""
        started = time.monotonic()
        try:
            with self._heartbeat.holding(job):
                self._work(job)
        except Fenced as fenced:
            _log.warning("job.fenced job_id=%s reason=%s", job.id, fenced)
            return False
        _log.info("job.ended job_id=%s elapsed_s=%.3f", job.id, time.monotonic() - started)
        return True

    def _work(self, job: JobRecord) -> None:
        request: PublishRequest | None = None

        def check_claim() -> None:
            self._consumer.until_redis(lambda: self._heartbeat.check_claim(job))

        try:
            request = PublishRequest.of(job, self._settings.data)
            with full_disk(request.path):
                manifest = publish(request, check_claim)
        except Fenced:
            raise
        except Exception as error:
            refusal = _as_service_error(error, job)
            check_claim()
            if request is not None:
                discard(request)
            self._consumer.until_redis(lambda: self._ledger.finish(job, error=refusal.body()))
            return
        check_claim()
        self._consumer.until_redis(lambda: replace_previous(self._ledger, request, job.created_at))
        self._consumer.until_redis(
            lambda: self._ledger.finish(job, result=_result(request, manifest))
        )


def _result(request: PublishRequest, manifest: Manifest) -> dict[str, object]:
    return {
        **request.result,
        "path": request.path,
        "global_step": manifest.step,
        "kind": manifest.kind,
        "nbytes": manifest.nbytes,
        "world_size": manifest.world_size,
    }


def _as_service_error(error: Exception, job: JobRecord) -> ServiceError:
    about = {"identifier": job.identifier, "job_id": job.id}
    if isinstance(error, ServiceError):
        return ServiceError(error.code, error.message, **{**error.details, **about})
    _log.exception("publish.failed job_id=%s", job.id)
    reason = error.strerror if isinstance(error, OSError) else type(error).__name__
    return ServiceError(
        "OPERATION_FAILED", f"the checkpoint could not be published: {reason}", **about
    )
