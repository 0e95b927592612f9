"""A small state cut the way FSDP cuts, staged and handed to the checkpointer as a group's ranks
would."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from nexrl_checkpointer.publish import PublishRequest
from nexrl_contract.names import CHECKPOINT_QUEUE, new_job_id, train_queue
from nexrl_contract.records import GroupRecord, JobRecord
from nexrl_ledger import Ledger, drop_queue
from nexrl_storage.manifest import read_manifest, staging_folder, verify_files
from nexrl_worker.checkpoint.load import TensorReader, inspect
from nexrl_worker.checkpoint.shards import GroupState, write_shards
from nexrl_worker.training.model.weights import Shard, rows_per_rank
from torch import Tensor

State = dict[str, Tensor]


def make_state(seed: int = 0, rows: int = 10) -> State:
    """Weights of several dtypes and odd sizes, one tensor with fewer rows than ranks, and both
    moments of one."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(rows, 3, generator=generator),
        "block.weight": torch.randn(7, 2, 2, generator=generator).to(torch.bfloat16),
        "norm.weight": torch.randn(2, generator=generator, dtype=torch.float64),
        "optim.exp_avg.embed.weight": torch.randn(rows, 3, generator=generator),
        "optim.exp_avg_sq.embed.weight": torch.rand(rows, 3, generator=generator),
    }


def cut(state: State, rank: int, world_size: int) -> Iterator[Shard]:
    """The rank's rows of every tensor, as the engine gives them; a 0-dim tensor is rank 0's."""
    for name, tensor in state.items():
        if not tensor.ndim:
            if rank == 0:
                yield Shard(name, tensor, (), 0)
            continue
        step = rows_per_rank(tensor.shape[0], world_size)
        offset = min(step * rank, tensor.shape[0])
        yield Shard(name, tensor[offset : offset + step], tuple(tensor.shape), offset)


def read_all(reader: TensorReader, state: State, world_size: int) -> State:
    """What ``world_size`` ranks read, put together again."""
    ranks = [
        {
            s.name: reader.read(s.name, s.offset_dim0, s.local_tensor.shape[0])
            for s in cut(state, rank, world_size)
        }
        for rank in range(world_size)
    ]
    return {name: torch.cat([rank[name] for rank in ranks]) for name in state}


def equal(left: State, right: State) -> bool:
    """Same names, dtypes and bits."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
        for name in left
    )


def model_source(folder: Path) -> Path:
    """A model folder as far as a sharded save reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "toy", "dtype": "bfloat16"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_toy.py").write_text("raise SystemExit")
    return folder


def stage(
    data: Path, job_id: str, state: State, world_size: int = 3, *, weight_only: bool = False
) -> Path:
    """What the ranks of a group leave for the checkpointer."""
    folder = staging_folder(data, job_id)
    folder.mkdir(parents=True)
    source = model_source(data / ".nexrl" / "source")
    for rank in range(world_size):
        group = (
            GroupState({"scalars": {"optimizer_steps": 4}, "seed": 7}, source)
            if rank == 0
            else None
        )
        rng = {"torch": f"state of {rank}"}
        write_shards(
            folder,
            rank,
            world_size,
            cut(state, rank, world_size),
            rng,
            group,
            weight_only=weight_only,
        )
    return folder


def publish_params(data: Path, job_id: str, path: Path, **changes: Any) -> dict[str, Any]:
    """What rank 0 hands over."""
    return {
        "staging": str(staging_folder(data, job_id)),
        "path": str(path),
        "identifier": "student",
        "step": 1,
        "seq": 5,
        "kind": "sharded",
        "weight_only": False,
        "remove_previous": False,
        "world_size": 3,
        "config_hash": "c0ffee",
        "result": {"note": "from rank 0"},
        **changes,
    }


def make_request(
    data: Path, path: Path, state: State | None = None, **changes: Any
) -> PublishRequest:
    """A staged save as the checkpointer sees it, at its first attempt."""
    job_id = new_job_id()
    stage(data, job_id, state or make_state(), weight_only=bool(changes.get("weight_only", False)))
    return PublishRequest(job_id=job_id, attempt=1, **publish_params(data, job_id, path, **changes))


def hand_over(ledger: Ledger, data: Path, path: Path, state: State, **changes: Any) -> JobRecord:
    """A save through the ledger, up to the moment when rank 0 has handed it to the checkpointer."""
    identifier = changes.get("identifier", "student")
    queue = train_queue(identifier)
    job = JobRecord(
        id=new_job_id(),
        operation="save_checkpoint",
        identifier=identifier,
        queue=queue,
        created_at=time.time(),
    )
    stage(data, job.id, state)
    ledger.submit(job, group=GroupRecord(identifier=identifier, state="ready"))
    epoch = next(group.epoch for group in ledger.groups.living() if group.identifier == identifier)
    claimed = ledger.claim(queue, identifier=identifier, epoch=epoch)
    assert claimed is not None and claimed.id == job.id
    params = publish_params(data, job.id, path, **changes)
    ledger.hand_over(claimed, CHECKPOINT_QUEUE, epoch=epoch, params=params)
    drop_queue(ledger.client, queue)
    return job


def loads(path: Path, *states: State) -> bool:
    """A published checkpoint is there, every hash is right, and it holds one of ``states``."""
    manifest = read_manifest(path)
    assert manifest is not None, f"{path} is not published"
    verify_files(path, manifest.files)
    reader = inspect(path).reader()
    found = {name: reader.read(name, 0, shape[0]) for name, shape in reader.shapes.items()}
    reader.close()
    return any(equal(found, state) for state in states)


def leftovers(*folders: Path) -> list[str]:
    """Hidden names beside checkpoints and folders in staging: none may stay."""
    hidden = [
        str(path) for folder in folders for path in folder.rglob(".*") if ".nexrl" not in path.parts
    ]
    staged = [str(path) for folder in folders for path in folder.glob(".nexrl/staging/*")]
    return hidden + staged


def eventually(look: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Return once ``look`` is true; fails after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not look():
        assert time.monotonic() < deadline, f"did not come true within {timeout_s} s"
        time.sleep(0.01)


def environment(**settings: str) -> dict[str, str]:
    """This process's environment with the service's settings."""
    return {**os.environ, **settings}
