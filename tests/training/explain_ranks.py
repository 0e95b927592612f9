"""What the ranks of test_explain.py run: explain an update, run it, and say both; arguments as in ranks.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nexrl_worker.training import Engine
from support import MemoryRows, config


def measured(path: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The plan of an update, and the update's own account."""
    engine = Engine.build(config(path, dtype="float32", **settings), "actor", torch.device("cpu"))
    random = torch.Generator().manual_seed(1)
    size, width = 10, 320
    attention = torch.ones(size, width, dtype=torch.int64)
    for row in range(size):
        attention[row, width - int(torch.randint(1, width // 2, (1,), generator=random)) :] = 0
    ids = torch.randint(0, 1000, (size, width), generator=random)
    tensors = {"input_ids": ids, "attention_mask": attention, "advantages": torch.ones(size, width - 1)}
    rows = MemoryRows(tensors, temperature=1.0)
    before = engine.fingerprint()
    plan = engine.plan("update_actor", size, rows.lengths())
    explained = engine.explain(plan, rows, rows.lengths(), {})
    unchanged = engine.fingerprint() == before and engine.optimizer_steps == 0 and not engine.pending
    results = [result.metrics for result in engine.update(plan, rows, {})]
    return {"explained": explained, "unchanged": unchanged, "results": results, "lengths": rows.lengths()}


if __name__ == "__main__":
    _, rank, world, meeting, out, path, settings = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=int(world))
    answer = measured(path, json.loads(settings))
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(answer))
    dist.destroy_process_group()
