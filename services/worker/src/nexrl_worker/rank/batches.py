"""A stored batch on all ranks: agreed on before it is computed, its answers gathered after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from nexrl_contract.operations import OPERATIONS
from nexrl_contract.sections import ActorConfig
from nexrl_payloads import PayloadStore

from nexrl_worker.rank.control_group import ControlGroup
from nexrl_worker.rank.model_folder import check_model_folder, config_errors
from nexrl_worker.rank.request import Request
from nexrl_worker.rank.rows import PayloadRows
from nexrl_worker.training.batch.plan import Plan
from nexrl_worker.training.engine import Engine
from nexrl_worker.training.micro_batch_loop import Parts
from nexrl_worker.training.prepare import Prepared


@dataclass(frozen=True, slots=True)
class Agreed:
    """A batch that every rank has found sound, and how it is cut. ``lengths`` are every row's on
    rank 0 where the plan needed them, on all ranks where it is explained."""

    prepared: Prepared
    plan: Plan
    lengths: list[int] | None


class Batches:
    """What ranks do around the mathematics of a batch. Public methods are collective."""

    def __init__(self, config: ActorConfig, control: ControlGroup, store: PayloadStore) -> None:
        self._config = config
        self._control = control
        self._store = store

    @contextmanager
    def agreed(self, engine: Engine, request: Request) -> Iterator[Agreed]:
        """Open, plan, check: two votes, and in between what rank 0 decides. After the second no
        rank may refuse alone; raises Refused before."""
        rows, prepared, mine = self._control.vote(lambda: self._open(engine, request))
        with rows:
            if engine.uses_reference(prepared) and not engine.frozen.ready:
                engine.frozen.examine()
            lengths = None if mine is None else self._control.gather_lengths(mine)
            in_order = None if lengths is None else [n for part in lengths for n in part]
            decided = self._control.decide(
                lambda: {
                    "plan": engine.plan(prepared, in_order).to_dict(),
                    "lengths": in_order if request.params.get("explain") else None,
                }
            )

            def check() -> Plan:
                plan = Plan.from_dict(decided["plan"])
                rows.keep(plan.rows_of(self._control.rank))
                engine.check(prepared, plan)
                return plan

            yield Agreed(prepared, self._control.vote(check), decided["lengths"])

    def _open(
        self, engine: Engine, request: Request
    ) -> tuple[PayloadRows, Prepared, list[int] | None]:
        """All that can be refused before the plan is known, and the frozen reference where it is
        needed. Local.

        The rows, their operation prepared, and the lengths of this rank's share where the plan
        needs them.
        """
        operation = OPERATIONS[request.operation]
        rows = PayloadRows(self._store, str(request.payload), operation, request.checksum)
        prepared = engine.prepare(request.operation, rows, request.params)
        if engine.uses_reference(prepared) and not engine.frozen.ready:
            self._load_reference(engine)
        if request.params.get("explain") or engine.needs_lengths(prepared):
            return rows, prepared, self._lengths(rows)
        return rows, prepared, None

    def _load_reference(self, engine: Engine) -> None:
        own = self._config.ref.model.path
        path = own or self._config.model.path
        key = "actor.ref.model.path" if own else "actor.model.path"
        check_model_folder(path, "ref", key)
        with config_errors(path, key):
            engine.frozen.load()

    def _lengths(self, rows: PayloadRows) -> list[int]:
        """Tokens of each row of this rank's share, of whose mask ``[B,S]`` it reads no more.
        Local."""
        size, rank, ranks = rows.size, self._control.rank, self._control.size
        part = slice(size * rank // ranks, size * (rank + 1) // ranks)
        if not rows.has("attention_mask"):
            return [rows.shape("input_ids")[1]] * (part.stop - part.start)
        lengths: list[int] = (rows.tensor("attention_mask", part) != 0).sum(dim=1).tolist()
        return lengths

    def gathered(self, answers: dict[str, Parts], size: int) -> dict[str, torch.Tensor]:
        """On rank 0 every tensor ``[B, ...]`` in the caller's row order; nothing on the others."""
        tensors = {name: self._in_row_order(answers[name], size) for name in sorted(answers)}
        return {name: full for name, full in tensors.items() if full is not None}

    def _in_row_order(self, parts: Parts, size: int) -> torch.Tensor | None:
        """``[n, ...]`` of each rank's rows become ``[B, ...]``, zero where no rank answered."""
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
