"""What the ranks of test_reference.py run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace as Space
from typing import Any

from nexrl_worker.training import Engine

from tests.helpers.engines import MemoryRows, batch
from tests.helpers.rank_processes import be_a_rank
from tests.helpers.ranks.engine import build, collect


def ready(engine: Engine, operation: str, rows: MemoryRows) -> None:
    """Load what the operation lacks, then examine it, as the runtime does."""
    if engine.uses_reference(engine.prepare(operation, rows, {})) and not engine.frozen.ready:
        engine.frozen.load()
        engine.frozen.examine()


def frozen(_: Path, group: str, reference: str) -> list[Any]:
    """Every row's frozen log-probabilities, of a group that packs."""
    engine, rows = build(group, ref=Space(model=Space(path=reference)), packing=True), batch()
    ready(engine, "compute_ref_log_prob", rows)
    found: list[Any] = collect(engine, "compute_ref_log_prob", rows).tolist()
    return found


if __name__ == "__main__":
    be_a_rank({"frozen": frozen})
