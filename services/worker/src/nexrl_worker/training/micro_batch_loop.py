"""Runs a rank's micro-batches, also where memory runs out on one rank alone (decision 4)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from nexrl_worker.training.batch.plan import Micro
from nexrl_worker.training.errors import DoesNotFit
from nexrl_worker.training.fsdp2 import Collective, can_reset, forget_kept_back, release, reset
from nexrl_worker.training.model.wrapper import ModelWrapper
from nexrl_worker.training.observe.costs import give_back, is_out_of_memory

_log = logging.getLogger(__name__)
Parts = list[tuple[list[int], Tensor]]
Act = Callable[[Sequence[int], bool], dict[str, Tensor]]
"""What is done with the rows of a micro-batch, and whether it is the last one; by name what it
answers, on the CPU, in the order of the rows."""


@dataclass
class Ran:
    """What this rank's micro-batches answered, by name: (rows, values [len(rows), ...]).

    `failed` is the number of the micro-batch under which memory ran out here, None where it did
    not; from there on the rank went along without rows.
    """

    micros: Sequence[Micro]
    answers: dict[str, Parts] = field(default_factory=dict)
    failed: int | None = None

    def does_not_fit(self, device: torch.device) -> DoesNotFit:
        """What to raise on all ranks after a vote that says that memory ran out on some; its `row`
        is one that was alone in its micro-batch, None where none was. Collective."""
        rows = () if self.failed is None else self.micros[self.failed]
        row = torch.tensor(rows[0] if len(rows) == 1 else -1, device=device)
        dist.all_reduce(row, op=dist.ReduceOp.MAX)
        return DoesNotFit(
            "memory ran out under a single row: send shorter rows, or start the group with "
            "enable_gradient_checkpointing",
            tensor="input_ids",
            row=int(row) if row >= 0 else None,
        )


def run_micro_batches(
    models: Sequence[ModelWrapper], device: torch.device, micros: Sequence[Micro], act: Act
) -> Ran:
    """Run `act` on every micro-batch, as many as any rank has. Collective, and without a vote: the
    other ranks learn of a `failed` one at the next, after which all call `drop` or all go on.

    `act` runs forwards, and a backward, of `models`. After a failure this rank goes on with
    micro-batches of no rows, as its gathered weights and gradients are worthless.
    """
    ran = Ran(micros)
    for number, rows in enumerate(micros):
        last = number == len(micros) - 1
        found, short = attempt(models, device, act, () if ran.failed is not None else rows, last)
        if short and ran.failed is None:
            ran.failed = number
        if found is None:
            break
        for name, values in found.items():
            # For a dummy too: all ranks answer with the same names.
            parts = ran.answers.setdefault(name, [])
            parts += [(list(rows), values)] if rows and ran.failed is None else []
    return ran


def attempt(
    models: Sequence[ModelWrapper],
    device: torch.device,
    act: Act,
    rows: Sequence[int],
    last: bool,
) -> tuple[dict[str, Tensor] | None, bool]:
    """`act` on the rows of a micro-batch, and False; True where memory ran out on this rank, and
    the answer is of no rows.

    What the failed one has not issued of its collectives it issues here, in `act` without rows
    (None: there are no other ranks). Raises what `act` raises besides, and what the torch before
    2.13 cannot put right.
    """
    for collective in _collectives(models):
        collective.begin()
    try:
        return act(rows, last), False
    except Exception as error:
        alone = dist.get_world_size() == 1
        # What failed inside a collective may have begun there, and nobody knows.
        mended = is_out_of_memory(error) and not isinstance(error, dist.DistError)
        if not mended or not (alone or all(can_reset(model) for model in models)):
            raise
        # Not the error itself: a record that is kept would keep the tensors of the failed
        # micro-batch alive.
        _log.warning("memory.short rows=%d %s", len(rows), str(error))
    # Out of the block, for the same reason.
    for model in models:
        reset(model)
    give_back(device)
    if alone:
        return None, True
    for collective in _collectives(models):
        collective.again()
    return act((), last), True


def drop(models: Sequence[ModelWrapper]) -> None:
    """Leave nothing gathered or kept back since the last step; sharded gradients stay."""
    for model in models:
        forget_kept_back(model)
        release(model)


def _collectives(models: Sequence[ModelWrapper]) -> Iterator[Collective]:
    return (collective for model in models for collective in model.collectives)
