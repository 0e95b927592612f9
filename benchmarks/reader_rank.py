"""A rank without mathematics: the real consumer, ledger and rows, and a reader where the model
would be.

``digest``: reads every byte of the batch once and says when it had. ``update``: reads what one
update reads, in the same order and pieces (the checks of all values, the masks, then each
micro-batch), and says what memory that took. Started like a real rank, with ``NEXRL_GROUP`` and
torchrun's variables.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nexrl_contract.operations import OPERATIONS
from nexrl_host.processes import die_with_parent
from nexrl_payloads import PayloadStore, open_store
from nexrl_payloads.file_store import FileStore
from nexrl_worker.rank.batches import PayloadRows
from nexrl_worker.rank.consumer import Consumer
from nexrl_worker.rank.control_group import ControlGroup
from nexrl_worker.rank.main import follow
from nexrl_worker.rank.request import Outcome, Request
from nexrl_worker.settings import RankSettings
from nexrl_worker.training.batch.layout import Layout
from nexrl_worker.training.batch.micro_batch import BatchReader
from nexrl_worker.training.batch.plan import PlanSettings, make_plan
from nexrl_worker.training.batch.validate import Limits, check_rows

from benchmarks import machine
from benchmarks.batches import NAMES, digest

_LIMITS = Limits(vocabulary=1000, positions=None)
_MICRO_ROWS = 2
# The kernel's own ageing of pages may mark the neighbours of a touched one, so of some looks the
# lowest counts.
_LOOKS = 3


class Reader:
    """Takes the place of ``nexrl_worker.rank.operations.Operations``."""

    def __init__(self, control: ControlGroup, store: PayloadStore, folder: Path, kind: str) -> None:
        self._control = control
        self._store = store
        self._folder = folder
        self._kind = kind

    def run(self, request: Request) -> Outcome:
        """Read the request's batch; metrics say how it went."""
        before = machine.reset_peak(os.getpid())
        operation = OPERATIONS[request.operation]
        assert request.payload is not None
        payload = request.payload
        with self._control.vote(
            lambda: PayloadRows(self._store, payload, operation, request.checksum)
        ) as rows:
            found = self._digest(rows) if self._kind == "digest" else self._update(rows)
            grown = machine.peak(os.getpid()) - before
            touched = self._touched(rows)
        return Outcome(
            {"metrics": {**found, "ranks": self._control.gather_lengths([grown, touched])}}
        )

    def _touched(self, rows: PayloadRows) -> int:
        """Bytes of the store's files, if it has any, that an update touches, found by doing it
        again."""
        if self._kind != "update" or not isinstance(self._store, FileStore):
            return 0
        found = []
        for _ in range(_LOOKS):
            machine.forget_touched(os.getpid())
            self._update(rows)
            found.append(machine.touched(os.getpid(), self._folder))
        return min(found)

    def _digest(self, rows: PayloadRows) -> dict[str, Any]:
        seen = digest({name: rows.tensor(name, slice(0, rows.size)) for name in NAMES})
        return {"read_at": time.monotonic(), "digest": seen}

    def _update(self, rows: PayloadRows) -> dict[str, Any]:
        plan = make_plan(rows.size, self._control.size, PlanSettings(micro_rows=_MICRO_ROWS))
        layout, mine = Layout.of(rows), plan.rows_of(self._control.rank)
        names = ("advantages", "old_log_probs")

        def check() -> None:
            rows.keep(mine)
            check_rows(rows, layout, _LIMITS, names, mine)

        self._control.vote(check)
        reader = BatchReader(rows, layout, names, torch.device("cpu"), torch.float32)
        micros = plan.mini_batches[0].ranks[self._control.rank]
        scored = sum(int(reader.read_scored(micro).sum()) for micro in micros)
        labels = sum(reader.read(micro).labels.numel() for micro in micros)
        return {"scored": scored, "labels": labels}

    def info(self) -> dict[str, Any]:
        """As the real one."""
        return {}

    def suspend(self, seq: int) -> bool:
        """There is no state."""
        return False


def main(kind: str) -> None:
    """Serve until the run ends."""
    die_with_parent(os.getppid())
    settings = RankSettings.from_env()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    control = ControlGroup()
    store = open_store(settings.payloads)
    reader: Any = Reader(control, store, settings.data, kind)
    if settings.rank == 0:
        Consumer(settings, control, reader, store, seq=0).run(ready=True)
    else:
        follow(control, reader)


if __name__ == "__main__":
    main(sys.argv[1])
