"""Rank 0's loop: take the head of the group's queue, run it with all ranks, write how it ended."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from dataclasses import asdict
from typing import Any

import redis
from nexrl_contract import envelope, names
from nexrl_contract.errors import ServiceError
from nexrl_contract.names import train_queue
from nexrl_contract.operations import DESTROY, OPERATIONS
from nexrl_contract.records import JobRecord, PayloadRef
from nexrl_ledger import Fenced, Ledger, QueueConsumer, connect, until_redis
from nexrl_payloads import PayloadStore
from tensor_codec import encode

from nexrl_worker.rank.control_group import ControlGroup
from nexrl_worker.rank.operations import Operations
from nexrl_worker.rank.request import Outcome, Refused, Request
from nexrl_worker.settings import GroupFolders, RankSettings

HEARTBEAT_S = 5.0
STORE_PATIENCE_S = 60.0
INLINE_RESULT_BYTES = 1024
SAVE_POLL_S = 0.1
AFTER_SAVES = tuple(name for name, row in OPERATIONS.items() if row.waits_for_saves)
_log = logging.getLogger(__name__)


class Consumer:
    """Runs in rank 0's main thread until the agent asks to stop, or a ``destroy`` ends the
    group."""

    def __init__(
        self,
        settings: RankSettings,
        control: ControlGroup,
        operations: Operations,
        store: PayloadStore,
        *,
        seq: int,
    ) -> None:
        self._settings = settings
        self._control = control
        self._operations = operations
        self._store = store
        self._seq = seq
        self._in_doubt = False
        self._saving = True  # until the ledger says that the checkpointer has no save of the group
        self._channel = GroupFolders(settings.data, settings.identifier).channel
        self._ledger = Ledger(connect(settings.redis_url))
        self._queue = train_queue(settings.identifier)
        self._consumer = QueueConsumer(
            settings.redis_url,
            self._queue,
            name=f"{settings.identifier}-e{settings.epoch}",
            on_wake=self._wake,
        )

    def run(self, *, ready: bool) -> None:
        """Announce the group and consume; returns after the ranks were told to stop. Raises Fenced
        when it was replaced."""
        state = {"state": "ready", "initialised": True} if ready else {"state": "up"}
        until_redis(lambda: self._update(**state, info=self._info(), heartbeat=time.time()))
        threading.Thread(target=self._keep_heard, name="heartbeat", daemon=True).start()
        self._consumer.run()

    def _wake(self) -> None:
        if self._channel.stop_asked:
            self._control.broadcast({"do": "stop", "seq": self._seq})
            self._operations.suspend(self._seq)
            self._consumer.stop()
        else:
            self._drain()

    def _drain(self) -> None:
        while not self._consumer.stopping and not self._channel.stop_asked:
            save = self._save_being_published()
            job = self._claim(held=AFTER_SAVES if save else ())
            if job is not None:
                self._run(job)
            elif save and (waiting := self._ledger.waiting(self._queue)):
                # Race: the save may be published between the two looks; the next one claims then.
                if waiting[0].operation in AFTER_SAVES:
                    reason = f"the checkpointer, which has yet to publish save {save}"
                    self._ledger.explain_wait(waiting[0].id, reason)
                time.sleep(SAVE_POLL_S)
            else:
                return

    def _save_being_published(self) -> str | None:
        """The id of a save of this group that the checkpointer has yet to publish."""
        if not self._saving:
            return None
        handed_over = self._ledger.waiting(names.CHECKPOINT_QUEUE)
        saves = [job.id for job in handed_over if job.identifier == self._settings.identifier]
        self._saving = bool(saves)
        return saves[0] if saves else None

    def _claim(self, held: tuple[str, ...]) -> JobRecord | None:
        """The head of the queue, if it is not ``held``."""
        # Race: Redis may have made the claim and lost the reply. After an error a running head is
        # therefore ours, for nobody else claims from this queue in this epoch.
        stale_before = time.time() + 1 if self._in_doubt else None
        self._in_doubt = True
        job = self._ledger.claim(
            self._queue,
            identifier=self._settings.identifier,
            epoch=self._settings.epoch,
            stale_before=stale_before,
            held=held,
        )
        self._in_doubt = False
        return job

    def _run(self, job: JobRecord) -> None:
        if job.operation == DESTROY:
            # Race: ranks leave one after another, and the agent looks at any time. Told first, it
            # takes none of them for one that died.
            self._channel.tell_destroyed(job.id)
            self._control.broadcast({"do": "destroy"})
            self._consumer.stop()
            return
        started = time.perf_counter()
        request = Request.of(job, self._seq)
        self._control.broadcast({"do": "run", "request": asdict(request)})
        try:
            outcome = self._operations.run(request)
        except Refused as error:
            self._fail(job, error)
        else:
            self._conclude(job, outcome)
        elapsed_s = time.perf_counter() - started
        _log.info("job.ended job_id=%s operation=%s %.3f s", job.id, job.operation, elapsed_s)

    def _conclude(self, job: JobRecord, outcome: Outcome) -> None:
        if outcome.publish is not None:
            self._saving = True
            self._hand_over(job, {**outcome.publish, "seq": self._seq})
            return
        if outcome.applied:
            self._seq += 1
        try:
            result, payload = self._stored(job, outcome)
        except ServiceError as error:
            if not outcome.applied:
                self._fail(job, error)
                return
            _log.error("result.lost job_id=%s %s", job.id, error)
            result, payload = {"metrics": {}, "meta_info": {"result_lost": error.message}}, None
        if OPERATIONS[job.operation].changes == "group":  # it has its model now
            until_redis(lambda: self._update(state="ready", initialised=True, info=self._info()))
        self._finish(
            job, result=result, result_payload=payload, seq=self._seq if outcome.applied else None
        )

    def _hand_over(self, job: JobRecord, params: dict[str, Any]) -> None:
        epoch = self._settings.epoch
        until_redis(
            lambda: self._ledger.hand_over(job, names.CHECKPOINT_QUEUE, epoch=epoch, params=params)
        )

    def _stored(
        self, job: JobRecord, outcome: Outcome
    ) -> tuple[dict[str, Any] | None, PayloadRef | None]:
        """Small results go into the record, tensors and long metrics into the payload store; raises
        what that raises."""
        text = json.dumps(outcome.result)
        if not outcome.tensors and len(text) <= INLINE_RESULT_BYTES:
            return outcome.result, None
        frame = encode(outcome.tensors, envelope.written(outcome.result))
        deadline = time.monotonic() + STORE_PATIENCE_S
        while True:
            try:
                stored = self._store.put(f"{job.id}.result", frame)
                return None, PayloadRef(
                    id=stored.id, nbytes=stored.nbytes, checksum=stored.checksum
                )
            except ServiceError as error:
                if error.code != "STORE_UNAVAILABLE" or time.monotonic() > deadline:
                    raise
                _log.warning("result.waits job_id=%s %s", job.id, error)
                time.sleep(0.5)

    def _fail(self, job: JobRecord, error: ServiceError) -> None:
        self._finish(job, error={**error.body(), "identifier": job.identifier, "job_id": job.id})

    def _finish(self, job: JobRecord, **ending: Any) -> None:
        until_redis(lambda: self._ledger.finish(job, epoch=self._settings.epoch, **ending))
        if job.payload is not None:
            self._store.discard(job.payload.id)

    def _update(self, **fields: Any) -> None:
        self._ledger.groups.update(self._settings.identifier, self._settings.epoch, **fields)

    def _info(self) -> dict[str, Any]:
        return {**self._operations.info(), "host": socket.gethostname(), "pid": os.getpid()}

    def _keep_heard(self) -> None:
        """Says that the process lives, also while an operation runs; on a connection of its own."""
        groups = Ledger(connect(self._settings.redis_url)).groups
        while True:
            try:
                groups.update(
                    self._settings.identifier, self._settings.epoch, heartbeat=time.time()
                )
            except redis.exceptions.RedisError:
                _log.warning("heartbeat.missed")
            except Fenced:  # the main thread hears of it, too
                return
            time.sleep(HEARTBEAT_S)
