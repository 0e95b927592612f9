"""What the ranks of test_resume.py run: save after one update and go on; or load and go on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from nexrl_worker.checkpoint.huggingface import FolderWriter, Stamp, export
from nexrl_worker.checkpoint.load import inspect
from nexrl_worker.checkpoint.shards import GroupState, write_shards
from nexrl_worker.training import Engine
from nexrl_worker.training.state import rng_state

from tests.helpers.engines import batch, config, planned
from tests.helpers.rank_processes import be_a_rank


def update(engine: Engine) -> None:
    rows = batch(size=6)
    prepared, plan = planned(engine, "update_actor", rows)
    engine.check(prepared, plan)
    engine.update(prepared, plan)


def save(engine: Engine, folder: Path) -> None:
    update(engine)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    group = GroupState({"scalars": engine.state.scalars()}, folder / "model") if rank == 0 else None
    write_shards(folder / "staging", rank, world_size, engine.state.shards(), rng_state(), group)


def load(engine: Engine, folder: Path) -> None:
    plan = inspect(folder / "ckpt")
    plan.verify(dist.get_rank(), dist.get_world_size())
    reader = plan.reader()
    plan.check_fits(
        reader,
        {shard.name: shard.global_shape for shard in engine.state.shards()},
        engine.state.architecture(),
    )
    engine.state.load_shards(reader)
    engine.state.load_scalars(plan.state()["scalars"])
    reader.close()


def check(phase: Callable[[Engine, Path], None], folder: Path) -> None:
    engine = Engine.build(
        config(str(folder / "model"), export_dtype="float64"), "actor", torch.device("cpu")
    )
    phase(engine, folder)
    update(engine)
    stamp = Stamp("student", 0, engine.state.weight_version, f"{engine.state.fingerprint():016x}")
    after = folder / f"after-{phase.__name__}"
    writer = (
        FolderWriter(after, folder / "model", stamp, layout=engine.state.layout())
        if dist.get_rank() == 0
        else None
    )
    assert export(engine.state.full_weights(), writer) is None
    if writer is not None:
        writer.finish()


if __name__ == "__main__":
    be_a_rank({phase.__name__: partial(check, phase) for phase in (save, load)})
