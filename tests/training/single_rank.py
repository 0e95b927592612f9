"""An engine of one rank in this process: its operations are planned, checked and run as the runtime does."""

from __future__ import annotations

from typing import Any

import torch
from nexrl_worker.training import Engine
from nexrl_worker.training.trainer import Result
from support import MemoryRows, config
from torch import Tensor

CPU = torch.device("cpu")


def build(path: str, role: str = "actor", **changes: Any) -> Engine:
    return Engine.build(config(path, **changes), role, CPU)


def update(engine: Engine, rows: MemoryRows, operation: str = "update_actor", **params: Any) -> list[Result]:
    plan = engine.plan(operation, rows.size, rows.lengths())
    engine.check(operation, plan, rows, params)
    return engine.update(plan, rows, params)


def compute(engine: Engine, operation: str, rows: MemoryRows, **params: Any) -> dict[str, Tensor]:
    """Every tensor of the answer, in the batch's order."""
    plan = engine.plan(operation, rows.size, rows.lengths())
    engine.check(operation, plan, rows, params)
    found = {}
    for name, parts in engine.compute(plan, rows, params).items():
        order = torch.tensor([row for indices, _ in parts for row in indices]).argsort()
        found[name] = torch.cat([values for _, values in parts])[order]
    return found
