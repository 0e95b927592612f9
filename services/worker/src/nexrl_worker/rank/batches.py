"""A stored batch on the ranks: each reads its rows, all agree before it is computed and gather the
answers after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from nexrl_contract.envelope import Envelope
from nexrl_contract.operations import OPERATIONS, Operation
from nexrl_contract.sections import ActorConfig
from nexrl_contract.tensors import sizes_of
from nexrl_payloads import PayloadStore

from nexrl_worker.rank.control_group import ControlGroup
from nexrl_worker.rank.model_folder import check_model_folder, config_errors
from nexrl_worker.rank.request import Request
from nexrl_worker.training.batch.layout import Rows
from nexrl_worker.training.batch.plan import Plan
from nexrl_worker.training.engine import Engine
from nexrl_worker.training.micro_batch_loop import Parts
from nexrl_worker.training.prepare import Prepared

_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


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


class PayloadRows(Rows):
    """The tensors of a stored batch that one operation reads; what else was sent is invisible.

    With the payload's ``checksum``, whatever it gives are the bytes that were stored: raises
    PAYLOAD_DAMAGED.
    """

    def __init__(
        self,
        store: PayloadStore,
        payload_id: str,
        operation: Operation,
        checksum: str | None = None,
    ) -> None:
        self._payload = store.open(payload_id, checksum)
        self._kept = _Kept(())
        header = self._payload.header
        self.header = {
            name: header.tensors[name] for name in operation.reads if name in header.tensors
        }
        self.metadata = Envelope.read(header.metadata).metadata
        self.size = sizes_of(self.header)[0]

    def keep(self, rows: Sequence[int]) -> None:
        """Say which rows (ascending) this rank works on, and read them once: all damage shows here,
        before the vote.

        Rows of a mapped payload stay where they are; those of another are fetched now, once for
        each tensor.
        """
        self._kept = _Kept(() if self._payload.mapped else tuple(rows))
        for name in self.header:
            if self._payload.mapped:
                self._payload.check(name, _contiguous(rows))
            else:
                self.tensor(name, rows)

    def tensor(self, name: str, rows: Sequence[int] | slice) -> torch.Tensor:
        """``[len(rows), ...]`` on CPU; a view of the mapped store, or of what is kept, where the
        rows are contiguous.

        Unsigned integers beyond 8 bits come as int64: torch computes next to nothing with them.
        """
        found = self._read(name, rows)
        return found.long() if found.dtype in _UNSIGNED else found

    def _read(self, name: str, rows: Sequence[int] | slice) -> torch.Tensor:
        rows = _contiguous(rows)
        places = self._kept.places(rows, self.size)
        if places is None:
            return self._payload.torch(name, rows)
        if name not in self._kept.tensors:
            self._kept.tensors[name] = self._payload.torch(name, _contiguous(self._kept.rows))
        return self._kept.tensors[name][places]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._kept = _Kept(())
        self._payload.__exit__(kind, error, trace)


class _Kept:
    """Some rows of a batch, each tensor's read once."""

    def __init__(self, rows: tuple[int, ...]) -> None:
        self.rows = rows
        self.tensors: dict[str, torch.Tensor] = {}
        self._place = {row: place for place, row in enumerate(rows)}

    def places(self, rows: Sequence[int] | slice, size: int) -> list[int] | slice | None:
        """Where ``rows`` are among those kept, None unless all of them are."""
        wanted = range(*rows.indices(size)) if isinstance(rows, slice) else rows
        if not wanted or not all(row in self._place for row in wanted):
            return None
        return _contiguous([self._place[row] for row in wanted])


def _contiguous(rows: Sequence[int] | slice) -> list[int] | slice:
    """A slice where the rows are a run, so that nothing has to be gathered."""
    if isinstance(rows, slice):
        return rows
    first = rows[0] if rows else 0
    if list(rows) == list(range(first, first + len(rows))):
        return slice(first, first + len(rows))
    return list(rows)
