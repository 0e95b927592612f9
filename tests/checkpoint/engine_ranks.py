"""One rank: `engine_ranks.py save|load RANK WORLD MEETING FOLDER`. Save after one update and go on; or load and go on."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from nexrl_worker.checkpoint.huggingface import FolderWriter, Stamp, export
from nexrl_worker.checkpoint.load import inspect
from nexrl_worker.checkpoint.shards import GroupState, write_shards
from nexrl_worker.training import Engine
from support import batch, config


def update(engine: Engine) -> None:
    rows = batch(size=6)
    plan = engine.plan("update_actor", rows.size, rows.lengths())
    engine.check("update_actor", plan, rows, {})
    engine.update(plan, rows, {})


def save(engine: Engine, folder: Path, rank: int, world_size: int) -> None:
    update(engine)
    group = GroupState({"scalars": engine.scalars()}, folder / "model") if rank == 0 else None
    write_shards(folder / "staging", rank, world_size, engine.shards(), engine.rng_state(), group)


def load(engine: Engine, folder: Path, rank: int, world_size: int) -> None:
    plan = inspect(folder / "ckpt")
    plan.verify(rank, world_size)
    reader = plan.reader()
    plan.check_fits(reader, {shard.name: shard.global_shape for shard in engine.shards()}, engine.architecture())
    engine.load_shards(reader)
    engine.load_scalars(plan.state()["scalars"])
    reader.close()


def main(phase: str, rank: int, world_size: int, meeting: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    engine = Engine.build(config(str(folder / "model")), "actor", torch.device("cpu"))
    (save if phase == "save" else load)(engine, folder, rank, world_size)
    update(engine)
    stamp = Stamp("student", 0, engine.weight_version, f"{engine.fingerprint():016x}")
    writer = FolderWriter(folder / f"after-{phase}", folder / "model", stamp) if rank == 0 else None
    assert export(engine.full_weights(), writer) is None
    if writer is not None:
        writer.finish()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], Path(sys.argv[5]))
