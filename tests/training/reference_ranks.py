"""What the ranks of test_reference.py run: `reference_ranks.py CHECKS RANK WORLD MEETING OUT [ARGUMENTS]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace as Space
from typing import Any

import torch
import torch.distributed as dist
from nexrl_worker.training import Engine
from ranks import build, collect
from support import MemoryRows, batch


def ready(engine: Engine, operation: str, rows: MemoryRows) -> None:
    """Load what the operation lacks, then examine it, as the runtime does."""
    if engine.lacks_reference(operation, rows, {}):
        engine.load_reference()
        engine.examine_reference()


def frozen(group: str, reference: str) -> list[Any]:
    """Every row's frozen log-probabilities, of a group that packs."""
    engine, rows = build(group, ref=Space(model=Space(path=reference)), packing=True), batch()
    ready(engine, "compute_ref_log_prob", rows)
    found: list[Any] = collect(engine, "compute_ref_log_prob", rows).tolist()
    return found


def main() -> None:
    _, rank, world, meeting, out, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=int(world))
    answer = frozen(*arguments)
    if rank == "0":
        Path(out).write_text(json.dumps(answer))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
