"""What the ranks of test_step_options.py run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nexrl_worker.training.batch.layout import Layout
from nexrl_worker.training.batch.micro_batch import BatchReader
from nexrl_worker.training.fsdp2 import forget_kept_back, synchronise
from nexrl_worker.training.model.build import Recipe, build_model
from nexrl_worker.training.model.policy import PolicyModel
from nexrl_worker.training.model.roles import role_of
from nexrl_worker.training.observe.costs import Clock
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.engines import MemoryRows, batch, config
from tests.helpers.rank_processes import be_a_rank

CPU = torch.device("cpu")


def build(path: str, **changes: Any) -> PolicyModel:
    actor = config(path, **changes)
    root = build_model(path, Recipe.of(actor, role_of("actor"), CPU))
    assert isinstance(root, PolicyModel)
    return root


def backward(root: PolicyModel, rows: MemoryRows, indices: list[int], packed: bool) -> None:
    """Sum of squared log-probabilities of these rows; FSDP averages over ranks."""
    micro = BatchReader(
        rows, Layout.of(rows), (), CPU, torch.float64, packed, temperature=0.7
    ).read(indices)
    log_probs, _ = root.score(micro, entropy=False, all_labels=True)
    total = torch.where(micro.mask, log_probs, 0.0).square().sum() * dist.get_world_size()
    total.backward()  # type: ignore[no-untyped-call]


def gradients(root: PolicyModel) -> dict[str, Tensor]:
    found = {name: param.grad.full_tensor().clone() for name, param in root.hf.named_parameters()}
    for param in root.parameters():
        param.grad = None
    return found


def cut(rank: int, world: int) -> list[list[int]]:
    """Seven rows over ranks and three micro-batches, of which some hold nothing."""
    mine = [row for row in range(7) if row % world == rank]
    return [mine[:1], mine[1:3], mine[3:]]


def synchronisation(folder: Path, path: str) -> dict[str, Any]:
    """Gradients of two accumulations: synchronised at every micro-batch, at the last one, and after
    an error."""
    root, rows = build(path), batch()
    clock = Clock(CPU)
    clock.watch(root.collectives)
    scatters: dict[str, float] = {}

    def accumulate(kept_back: bool, packed: bool) -> None:
        micros = cut(dist.get_rank(), dist.get_world_size())
        for number, indices in enumerate(micros):
            synchronise(root, not kept_back or number == len(micros) - 1)
            backward(root, rows, indices, packed)

    for name, kept_back, packed in (
        ("each", False, False),
        ("last", True, False),
        ("packed", True, True),
    ):
        clock.start()
        for _ in range(2):
            accumulate(kept_back, packed)
        scatters[name] = clock.seconds()["communication"]
        keep(folder, name, gradients(root))
    synchronise(root, False)
    backward(root, rows, [0], False)
    forget_kept_back(root)
    for param in root.parameters():
        param.grad = None
    for _ in range(2):
        accumulate(True, False)
    keep(folder, "after-error", gradients(root))
    return {"communication": scatters}


def keep(folder: Path, name: str, tensors: dict[str, Tensor]) -> None:
    if dist.get_rank() == 0:
        save_file(tensors, str(folder / f"{name}-{dist.get_world_size()}.safetensors"))


def waiting(folder: Path, path: str) -> dict[str, Any]:
    """One rank comes late to a forward: the other's clock says so, under communication."""
    root, rows = build(path), batch()
    clock = Clock(CPU)
    clock.watch(root.collectives)
    backward(root, rows, [0], False)
    clock.start()
    dist.barrier()
    if dist.get_rank() == 1:
        time.sleep(1.5)
    with clock.measure("forward"):
        micro = BatchReader(rows, Layout.of(rows), (), CPU, torch.float64, temperature=0.7).read(
            [0]
        )
        loss = root.score(micro, entropy=False, all_labels=True)[0].sum()
    with clock.measure("backward"):
        loss.backward()  # type: ignore[no-untyped-call]
    return clock.seconds()


if __name__ == "__main__":
    be_a_rank({"synchronisation": synchronisation, "waiting": waiting})
