"""The operations of a group, run by all ranks together.

Each is: local work in :meth:`ControlGroup.vote` (an error there fails the job and leaves the group
in step), then the collective part. What raises outside a vote has left the ranks out of step: it
ends the process, and with it this incarnation of the group.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from nexrl_contract.operations import OPERATIONS, Operation
from nexrl_contract.sections import ActorConfig
from nexrl_payloads import PayloadStore
from nexrl_storage.manifest import fingerprint_text

from nexrl_worker.checkpoint.manager import CheckpointManager
from nexrl_worker.rank.batches import Agreed, Batches
from nexrl_worker.rank.control_group import ControlGroup
from nexrl_worker.rank.model_folder import check_model_folder, config_errors
from nexrl_worker.rank.request import Outcome, Refused, Request
from nexrl_worker.settings import RankSettings
from nexrl_worker.snapshot import Snapshot
from nexrl_worker.training.engine import Engine
from nexrl_worker.training.errors import DoesNotFit
from nexrl_worker.training.micro_batch_loop import Parts

_NO_SPACE_PAUSE_S = 1.0
_NAMED_JOBS = 16
Answer = TypeVar("Answer")
_log = logging.getLogger(__name__)


class Operations:
    """The group's model and what can be done with it; the same calls in the same order on every
    rank."""

    def __init__(
        self,
        settings: RankSettings,
        config: ActorConfig,
        control: ControlGroup,
        store: PayloadStore,
        device: torch.device,
    ) -> None:
        self._settings = settings
        self._config = config
        self._control = control
        self._device = device
        self._engine: Engine | None = None
        self._unstepped_from = 0
        """Operations in the weights before the first of the pending gradients."""
        self._unstepped: list[str] = []
        """The jobs of the pending gradients."""
        self._lost: tuple[str, ...] = ()
        """The jobs of gradients that went with a restart, until an optim_step has said so."""
        self._batches = Batches(config, control, store)
        self._checkpoints = CheckpointManager(settings, config, control)

    def run(self, request: Request) -> Outcome:
        """Run one operation; raises Refused on every rank alike when nothing changed."""
        role = self._settings.role
        if role not in OPERATIONS[request.operation].roles:
            raise Refused("ROLE_UNSUPPORTED", f"a {role} does not run {request.operation}")
        return IMPLEMENTED[request.operation](self, request)

    def info(self) -> dict[str, Any]:
        """What ``worker_info`` shows of the model."""
        return self._engine.info() if self._engine is not None else {}

    # --- a clean stop and the next start ---

    def restore(self) -> None:
        """Build the model and load the state of a clean stop, if there is one. Collective."""
        self._build()
        self._lost = self._checkpoints.resume(self._model().state).lost

    def suspend(self, seq: int) -> None:
        """Write the state for the next start, pending gradients left out; waits while the disk is
        full. Collective."""
        if self._engine is None:
            return
        snapshot = Snapshot(seq, 0, self._settings.epoch, self._lost)
        if self._engine.state.pending:
            first, lost = self._unstepped_from, (*self._lost, *self._unstepped)
            snapshot = Snapshot(first, seq - first, self._settings.epoch, lost)
        while True:
            try:
                self._checkpoints.suspend(self._engine.state, snapshot)
            except Refused as error:
                if error.code != "NO_SPACE":
                    raise
                _log.warning("state.waits %s", error)
                time.sleep(_NO_SPACE_PAUSE_S)
            else:
                return

    # --- the model ---

    def _model(self) -> Engine:
        if self._engine is None:
            raise Refused("GROUP_NOT_READY", "the group has no model yet; call init_model first")
        return self._engine

    def _without_pending(self, verb: str) -> Engine:
        engine = self._model()
        if engine.state.pending:
            raise Refused(
                "GRADIENTS_PENDING",
                f"cannot {verb} while gradients of forward_backward are pending; call optim_step "
                "(or optim_step(discard=True)) first",
            )
        return engine

    def _build(self) -> None:
        """Collective, and refused as a whole: the first bad tensor may be in one rank's rows
        alone."""

        def vote(act: Callable[[], Answer]) -> Answer:
            def reading() -> Answer:
                with config_errors(self._config.model.path, "actor.model.path"):
                    return act()

            return self._control.vote(reading)

        self._engine = Engine.build(self._config, self._settings.role, self._device, vote)

    def _init_model(self, request: Request) -> Outcome:
        if self._engine is not None:
            return Outcome({"already": True, **self.info()})
        self._control.vote(lambda: check_model_folder(self._config.model.path, self._settings.role))
        self._build()
        return Outcome({"already": False, **self.info()})

    # --- checkpoints, and a barrier ---

    def _save(self, request: Request) -> Outcome:
        engine = self._without_pending("save")
        return self._checkpoints.save(engine.state, request.job_id, request.params, request.seq)

    def _load(self, request: Request) -> Outcome:
        outcome = self._checkpoints.load(self._without_pending("load").state, request.params)
        self._lost = ()
        return outcome

    def _convert(self, request: Request) -> Outcome:
        return self._checkpoints.convert(self._model().state, request.params)

    def _barrier(self, request: Request) -> Outcome:
        self._control.barrier()
        return Outcome()

    # --- training and looking ---

    def _update(self, request: Request) -> Outcome:
        def run(engine: Engine, batch: Agreed) -> Outcome:
            results = engine.update(batch.prepared, batch.plan)
            self._lost = ()
            first_epoch = results[: len(results) // self._config.ppo_epochs]
            answers = _together([result.answers for result in first_epoch])
            outcome = _applied([result.metrics for result in results], self._weights(engine))
            outcome.tensors.update(self._batches.gathered(answers, batch.plan.size))
            return outcome

        self._without_pending("update")
        return self._on_batch(request, run)

    def _forward_backward(self, request: Request) -> Outcome:
        def run(engine: Engine, batch: Agreed) -> Outcome:
            if not engine.state.pending:
                self._unstepped_from, self._unstepped = request.seq, []
            result = engine.accumulate(batch.prepared, batch.plan)
            self._unstepped.append(request.job_id)
            outcome = _applied([result.metrics], {})
            outcome.tensors.update(self._batches.gathered(result.answers, batch.plan.size))
            return outcome

        return self._on_batch(request, run)

    def _optim_step(self, request: Request) -> Outcome:
        engine = self._model()
        lost, self._lost = self._lost, ()
        if lost and not request.params.get("discard"):
            raise _gradients_lost(lost)
        return self._timed(
            request, lambda: _applied([engine.step(**request.params)], self._weights(engine))
        )

    def _compute(self, request: Request) -> Outcome:
        def run(engine: Engine, batch: Agreed) -> Outcome:
            result = engine.compute(batch.prepared, batch.plan)
            answers = self._batches.gathered(result.answers, batch.plan.size)
            return Outcome({"metrics": result.metrics}, answers)

        return self._on_batch(request, run)

    def _on_batch(self, request: Request, run: Callable[[Engine, Agreed], Outcome]) -> Outcome:
        """What every rank agrees to is explained, or run: then nothing that one rank alone can
        refuse."""
        engine = self._model()
        with self._batches.agreed(engine, request) as batch:
            if request.params.get("explain"):
                plan = engine.explain(batch.prepared, batch.plan, batch.lengths or [])
                meta = {"plan": plan, "ignored": request.ignored}
                return Outcome({"metrics": {}, "meta_info": meta})
            try:
                return self._timed(request, lambda: run(engine, batch))
            except DoesNotFit as error:  # on all ranks, see decision 4
                raise Refused("INVALID_VALUE", error.message, **error.details()) from None

    def _weights(self, engine: Engine) -> dict[str, Any]:
        """Which weights an operation left behind. Collective."""
        return {
            "weight_version": engine.state.weight_version,
            "fingerprint": fingerprint_text(engine.state.fingerprint()),
        }

    def _timed(self, request: Request, run: Callable[[], Outcome]) -> Outcome:
        started = time.perf_counter()
        outcome = run()
        meta = outcome.result.setdefault("meta_info", {})
        meta |= {"timing": {"ranks_s": time.perf_counter() - started}, "ignored": request.ignored}
        return outcome


_Handler = Callable[[Operations, Request], Outcome]
_WITHOUT_BATCH: dict[str, _Handler] = {
    "init_model": Operations._init_model,
    "optim_step": Operations._optim_step,
    "save_checkpoint": Operations._save,
    "load_checkpoint": Operations._load,
    "convert_checkpoint_to_huggingface": Operations._convert,
    "barrier": Operations._barrier,
}


def _handler(row: Operation) -> _Handler:
    """What the ranks do for a row that is theirs. Of a batch the engine knows the rest: its
    objective by the row's loss, its answers by the row's name."""
    if not row.takes_batch:
        return _WITHOUT_BATCH[row.name]
    if row.steps:
        return Operations._update
    return Operations._forward_backward if row.trains else Operations._compute


IMPLEMENTED = {name: _handler(row) for name, row in OPERATIONS.items() if row.by_ranks}


def _gradients_lost(jobs: tuple[str, ...]) -> Refused:
    """Said once, and nothing is applied: a step on part of the gradients would be a wrong one."""
    named = list(jobs[:_NAMED_JOBS])
    more = ", ..." if len(jobs) > len(named) else ""
    return Refused(
        "GRADIENTS_LOST",
        f"the gradients of {len(jobs)} forward_backward went with a restart of the group, and "
        f"their jobs are rolled_back ({', '.join(named)}{more}): send those batches again and call "
        "optim_step again; optim_step(discard=True) drops what is pending. No step was taken",
        jobs=named,
    )


def _together(answers: list[dict[str, Parts]]) -> dict[str, Parts]:
    """What several mini-batches answered, by name."""
    return {name: [part for answer in answers for part in answer[name]] for name in answers[0]}


def _applied(steps: list[dict[str, Any]], meta: dict[str, Any]) -> Outcome:
    """Numbers under ``metrics`` (a list where there were several steps), and why a step was skipped
    under ``meta_info``.

    Trainers average whatever stands among the metrics, so nothing else may.
    """
    skipped = [step.pop("skipped", None) for step in steps]
    if any(reason is not None for reason in skipped):
        meta = {**meta, "skipped": skipped if len(steps) > 1 else skipped[0]}
    names = sorted({name for step in steps for name in step})
    several = {name: [step.get(name) for step in steps] for name in names}
    metrics = steps[0] if len(steps) == 1 else several
    return Outcome({"metrics": metrics, "meta_info": meta}, applied=True)
