"""An engine of one rank in this process: its operations are planned, checked and run as the runtime
does."""

from __future__ import annotations

from typing import Any

import torch
from nexrl_worker.training import Engine
from nexrl_worker.training.trainer import Result
from torch import Tensor

from tests.helpers.engines import MemoryRows, config, planned

CPU = torch.device("cpu")


def build(path: str, role: str = "actor", **changes: Any) -> Engine:
    return Engine.build(config(path, **changes), role, CPU)


def update(
    engine: Engine, rows: MemoryRows, operation: str = "update_actor", **params: Any
) -> list[Result]:
    prepared, plan = planned(engine, operation, rows, **params)
    engine.check(prepared, plan)
    return engine.update(prepared, plan)


def compute(engine: Engine, operation: str, rows: MemoryRows, **params: Any) -> dict[str, Tensor]:
    """Every tensor of the answer, in the batch's order."""
    prepared, plan = planned(engine, operation, rows, **params)
    engine.check(prepared, plan)
    found = {}
    for name, parts in engine.compute(prepared, plan).answers.items():
        order = torch.tensor([row for indices, _ in parts for row in indices]).argsort()
        found[name] = torch.cat([values for _, values in parts])[order]
    return found
