"""The operations of a group, run by all ranks together.

Each is: local work in :meth:`ControlGroup.vote` (an error there fails the job and leaves the group
in step), then the collective part. What raises outside a vote has left the ranks out of step: it
ends the process, and with it this incarnation of the group.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from nexrl_contract.operations import OPERATIONS
from nexrl_contract.sections import ActorConfig
from nexrl_payloads import PayloadStore
from nexrl_storage.manifest import fingerprint_text

from nexrl_worker.checkpoint.manager import CheckpointManager
from nexrl_worker.rank.control_group import ControlGroup
from nexrl_worker.rank.model_folder import check_model_folder, config_errors
from nexrl_worker.rank.request import Outcome, Refused, Request
from nexrl_worker.rank.rows import PayloadRows
from nexrl_worker.settings import RankSettings
from nexrl_worker.snapshot import Snapshot
from nexrl_worker.training.batch.plan import Plan
from nexrl_worker.training.engine import Engine
from nexrl_worker.training.errors import DoesNotFit
from nexrl_worker.training.micro_batch_loop import Parts
from nexrl_worker.training.prepare import Prepared

_NO_SPACE_PAUSE_S = 1.0
_NAMED_JOBS = 16
Answer = TypeVar("Answer")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A batch as one rank has opened it: its operation prepared, and the lengths of this rank's
    share if they are needed."""

    rows: PayloadRows
    prepared: Prepared
    lengths: list[int] | None


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
        self._store = store
        self._device = device
        self._engine: Engine | None = None
        self._unstepped_from = 0
        """Operations in the weights before the first of the pending gradients."""
        self._unstepped: list[str] = []
        """The jobs of the pending gradients."""
        self._lost: tuple[str, ...] = ()
        """The jobs of gradients that went with a restart, until an optim_step has said so."""
        self._checkpoints = CheckpointManager(settings, config, control)

    def run(self, request: Request) -> Outcome:
        """Run one operation; raises Refused on every rank alike when nothing changed."""
        role = self._settings.role
        if role not in OPERATIONS[request.operation].roles:
            raise Refused("ROLE_UNSUPPORTED", f"a {role} does not run {request.operation}")
        return IMPLEMENTED[request.operation](self, request)

    def restore(self) -> None:
        """Build the model and load the state of a clean stop, if there is one. Collective."""
        self._build()
        self._lost = self._checkpoints.resume(self._model().state).lost

    def suspend(self, seq: int) -> None:
        """Write the state for the next start, pending gradients left out; waits while the disk is
        full. Collective."""
        if self._engine is None:
            return
        kept = Snapshot(seq, 0, self._settings.epoch, self._lost)
        if self._engine.state.pending:
            first = self._unstepped_from
            kept = Snapshot(
                first, seq - first, self._settings.epoch, (*self._lost, *self._unstepped)
            )
        while True:
            try:
                self._checkpoints.suspend(self._engine.state, kept)
            except Refused as error:
                if error.code != "NO_SPACE":
                    raise
                _log.warning("state.waits %s", error)
                time.sleep(_NO_SPACE_PAUSE_S)
            else:
                return

    def info(self) -> dict[str, Any]:
        """What ``worker_info`` shows of the model."""
        return self._engine.info() if self._engine is not None else {}

    def _model(self) -> Engine:
        if self._engine is None:
            raise Refused("GROUP_NOT_READY", "the group has no model yet; call init_model first")
        return self._engine

    def _sound_engine(self, verb: str) -> Engine:
        engine = self._model()
        if engine.state.pending:
            raise Refused(
                "GRADIENTS_PENDING",
                (
                    f"cannot {verb} while gradients of forward_backward are pending; call "
                    "optim_step "
                    "(or optim_step(discard=True)) first"
                ),
            )
        return engine

    def _build(self) -> None:
        """Collective, and refused as a whole: the first bad tensor may be in one rank's rows
        alone."""

        def agree(act: Callable[[], Answer]) -> Answer:
            return self._control.vote(
                lambda: self._reading(self._config.model.path, "actor.model.path", act)
            )

        self._engine = Engine.build(self._config, self._settings.role, self._device, agree)

    def _reading(self, path: str, key: str, act: Callable[[], Answer]) -> Answer:
        with config_errors(path, key):
            return act()

    def _init_model(self, request: Request) -> Outcome:
        if self._engine is not None:
            return Outcome({"already": True, **self.info()})
        self._control.vote(lambda: check_model_folder(self._config.model.path, self._settings.role))
        self._build()
        return Outcome({"already": False, **self.info()})

    def _save(self, request: Request) -> Outcome:
        return self._checkpoints.save(
            self._sound_engine("save").state, request.job_id, request.params, request.seq
        )

    def _load(self, request: Request) -> Outcome:
        outcome = self._checkpoints.load(self._sound_engine("load").state, request.params)
        self._lost = ()
        return outcome

    def _convert(self, request: Request) -> Outcome:
        return self._checkpoints.convert(self._model().state, request.params)

    def _barrier(self, request: Request) -> Outcome:
        self._control.barrier()
        return Outcome()

    def _update(self, request: Request) -> Outcome:
        def run(engine: Engine, prepared: Prepared, plan: Plan) -> Outcome:
            results = engine.update(prepared, plan)
            self._lost = ()
            first_epoch = results[: len(results) // self._config.ppo_epochs]
            outcome = self._answered(
                _together([result.answers for result in first_epoch]), plan.size
            )
            return _with_metrics(
                outcome, [result.metrics for result in results], self._weights(engine)
            )

        self._sound_engine("update")
        return self._with_batch(request, run)

    def _forward_backward(self, request: Request) -> Outcome:
        def run(engine: Engine, prepared: Prepared, plan: Plan) -> Outcome:
            if not engine.state.pending:
                self._unstepped_from, self._unstepped = request.seq, []
            result = engine.accumulate(prepared, plan)
            self._unstepped.append(request.job_id)
            return _with_metrics(self._answered(result.answers, plan.size), [result.metrics], {})

        return self._with_batch(request, run)

    def _optim_step(self, request: Request) -> Outcome:
        engine = self._model()
        lost, self._lost = self._lost, ()
        if lost and not request.params.get("discard"):
            raise _gradients_lost(lost)
        return self._timed(
            request,
            lambda: _with_metrics(
                Outcome(), [engine.step(**request.params)], self._weights(engine)
            ),
        )

    def _compute(self, request: Request) -> Outcome:
        def run(engine: Engine, prepared: Prepared, plan: Plan) -> Outcome:
            result = engine.compute(prepared, plan)
            outcome = self._answered(result.answers, plan.size)
            outcome.result["metrics"] = result.metrics
            return outcome

        return self._with_batch(request, run)

    def _weights(self, engine: Engine) -> dict[str, Any]:
        """Which weights an operation left behind. Collective."""
        return {
            "weight_version": engine.state.weight_version,
            "fingerprint": fingerprint_text(engine.state.fingerprint()),
        }

    def _answered(self, answers: dict[str, Parts], size: int) -> Outcome:
        """Rank 0 gets every tensor ``[B, ...]`` in the caller's row order. Collective."""
        tensors = {name: self._in_row_order(answers[name], size) for name in sorted(answers)}
        return Outcome(
            {"metrics": {}}, {name: full for name, full in tensors.items() if full is not None}
        )

    def _in_row_order(self, parts: Parts, size: int) -> torch.Tensor | None:
        mine = [row for rows, _ in parts for row in rows]
        order = self._control.gather_lengths(mine)
        every = self._control.collect(torch.cat([values for _, values in parts]) if mine else None)
        if order is None or every is None:
            return None
        filled = [part for part in every if part is not None]
        full = torch.zeros(size, *filled[0].shape[1:], dtype=filled[0].dtype)
        for rows, part in zip(order, every, strict=True):
            if part is not None:
                full[torch.tensor(rows)] = part
        return full

    def _with_batch(
        self, request: Request, run: Callable[[Engine, Prepared, Plan], Outcome]
    ) -> Outcome:
        """Prepare, plan, check, run: two votes and what rank 0 decides, then nothing that one rank
        alone can refuse."""
        engine = self._model()
        opened = self._control.vote(lambda: self._open(engine, request))
        with opened.rows as rows:
            prepared = opened.prepared
            if engine.uses_reference(prepared) and not engine.frozen.ready:
                engine.frozen.examine()
            lengths = None if opened.lengths is None else self._every_length(opened.lengths)
            explains = bool(request.params.get("explain"))
            decided = self._control.decide(
                lambda: {
                    "plan": engine.plan(prepared, lengths).to_dict(),
                    "lengths": lengths if explains else None,
                }
            )

            def check() -> Plan:
                plan = Plan.from_dict(decided["plan"])
                rows.keep(plan.rows_of(self._control.rank))
                engine.check(prepared, plan)
                return plan

            plan = self._control.vote(check)
            if explains:
                meta = {
                    "plan": engine.explain(prepared, plan, decided["lengths"]),
                    "ignored": request.ignored,
                }
                return Outcome({"metrics": {}, "meta_info": meta})
            try:
                return self._timed(request, lambda: run(engine, prepared, plan))
            except DoesNotFit as error:
                raise Refused("INVALID_VALUE", error.message, **error.details()) from None

    def _open(self, engine: Engine, request: Request) -> Opened:
        """All that can be refused before the cut is known, and the frozen reference where it is
        needed. Local."""
        rows = PayloadRows(
            self._store, str(request.payload), OPERATIONS[request.operation], request.checksum
        )
        prepared = engine.prepare(request.operation, rows, request.params)
        if engine.uses_reference(prepared) and not engine.frozen.ready:
            own = self._config.ref.model.path
            path, key = (
                own or self._config.model.path,
                "actor.ref.model.path" if own else "actor.model.path",
            )
            check_model_folder(path, "ref", key)
            self._reading(path, key, engine.frozen.load)
        needed = request.params.get("explain") or engine.needs_lengths(prepared)
        return Opened(rows, prepared, self._lengths(rows) if needed else None)

    def _lengths(self, rows: PayloadRows) -> list[int]:
        """Tokens of this rank's share of the rows, of whose mask it reads no more. Local."""
        size, rank, ranks = rows.size, self._control.rank, self._control.size
        part = slice(size * rank // ranks, size * (rank + 1) // ranks)
        if not rows.has("attention_mask"):
            return [rows.shape("input_ids")[1]] * (part.stop - part.start)
        return [
            int(length) for length in (rows.tensor("attention_mask", part) != 0).sum(dim=1).tolist()
        ]

    def _every_length(self, mine: list[int]) -> list[int] | None:
        """All ranks' lengths in row order, on rank 0. Collective."""
        every = self._control.gather_lengths(mine)
        return None if every is None else [length for lengths in every for length in lengths]

    def _timed(self, request: Request, run: Callable[[], Outcome]) -> Outcome:
        started = time.perf_counter()
        outcome = run()
        meta = outcome.result.setdefault("meta_info", {})
        meta |= {"timing": {"ranks_s": time.perf_counter() - started}, "ignored": request.ignored}
        return outcome


IMPLEMENTED: dict[str, Callable[[Operations, Request], Outcome]] = {
    "init_model": Operations._init_model,
    "update_actor": Operations._update,
    "update_actor_with_distillation": Operations._update,
    "update_critic": Operations._update,
    "forward_backward": Operations._forward_backward,
    "optim_step": Operations._optim_step,
    "compute_log_prob": Operations._compute,
    "compute_ref_log_prob": Operations._compute,
    "compute_values": Operations._compute,
    "compute_rewards": Operations._compute,
    "save_checkpoint": Operations._save,
    "load_checkpoint": Operations._load,
    "convert_checkpoint_to_huggingface": Operations._convert,
    "barrier": Operations._barrier,
}
"""What the ranks do for each row of OPERATIONS that is theirs."""


def _gradients_lost(jobs: tuple[str, ...]) -> Refused:
    """Said once, and nothing is applied: a step on part of the gradients would be a wrong one."""
    named = list(jobs[:_NAMED_JOBS])
    return Refused(
        "GRADIENTS_LOST",
        f"the gradients of {len(jobs)} forward_backward went with a restart of the group, and "
        "their jobs are rolled_back "
        f"({', '.join(named)}{', ...' if len(jobs) > len(named) else ''}): send those batches "
        "again and call optim_step "
        "again; optim_step(discard=True) drops what is pending. No step was taken",
        jobs=named,
    )


def _together(answers: list[dict[str, Parts]]) -> dict[str, Parts]:
    """What several mini-batches answered, by name."""
    return {name: [part for answer in answers for part in answer[name]] for name in answers[0]}


def _with_metrics(outcome: Outcome, steps: list[dict[str, Any]], meta: dict[str, Any]) -> Outcome:
    """Numbers under ``metrics`` (a list where there were several steps), and why a step was skipped
    under ``meta_info``.

    Trainers average whatever stands among the metrics, so nothing else may.
    """
    skipped = [step.pop("skipped", None) for step in steps]
    if any(reason is not None for reason in skipped):
        meta = {**meta, "skipped": skipped if len(steps) > 1 else skipped[0]}
    names = sorted({name for step in steps for name in step})
    metrics = (
        steps[0]
        if len(steps) == 1
        else {name: [step.get(name) for step in steps] for name in names}
    )
    return Outcome({"metrics": metrics, "meta_info": meta}, outcome.tensors, applied=True)
