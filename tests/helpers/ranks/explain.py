"""What the ranks of test_explain.py run: explain an update, run it, and say both; arguments as in
engine.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from nexrl_worker.training import Engine

from tests.helpers.engines import MemoryRows, config, planned
from tests.helpers.rank_processes import be_a_rank


def explain(_: Path, path: str, settings: str) -> dict[str, Any]:
    """The plan of an update, and the update's own account."""
    engine = Engine.build(
        config(path, **{"dtype": "float32", **json.loads(settings)}), "actor", torch.device("cpu")
    )
    random = torch.Generator().manual_seed(1)
    size, width = 10, 320
    attention = torch.ones(size, width, dtype=torch.int64)
    for row in range(size):
        attention[row, width - int(torch.randint(1, width // 2, (1,), generator=random)) :] = 0
    ids = torch.randint(0, 1000, (size, width), generator=random)
    tensors = {
        "input_ids": ids,
        "attention_mask": attention,
        "advantages": torch.ones(size, width - 1),
    }
    rows = MemoryRows(tensors, temperature=1.0)
    before = engine.state.fingerprint()
    prepared, plan = planned(engine, "update_actor", rows)
    explained = engine.explain(prepared, plan, rows.lengths())
    unchanged = (
        engine.state.fingerprint() == before
        and engine.state.optimizer_steps == 0
        and not engine.state.pending
    )
    results = [result.metrics for result in engine.update(prepared, plan)]
    return {
        "explained": explained,
        "unchanged": unchanged,
        "results": results,
        "lengths": rows.lengths(),
    }


if __name__ == "__main__":
    be_a_rank({"explain": explain})
