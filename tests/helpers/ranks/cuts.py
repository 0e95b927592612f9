"""What the ranks of test_cuts.py and test_role_memory.py run."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nexrl_contract.sections import RolloutCorrectionConfig
from nexrl_worker.training import Engine, Plan
from nexrl_worker.training.prepare import Prepared
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.engines import MemoryRows, planned
from tests.helpers.rank_processes import be_a_rank
from tests.helpers.ranks.engine import build, save, weights


def agreed_plan(
    engine: Engine, operation: str, rows: MemoryRows, **params: Any
) -> tuple[Prepared, Plan]:
    """Made once, sent as JSON, as the runtime does."""
    prepared, plan = planned(engine, operation, rows, **params)
    text = [json.dumps(plan.to_dict()) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(text)
    return prepared, Plan.from_dict(json.loads(text[0]))


def watch(engine: Engine, into: list[dict[str, Tensor]]) -> None:
    """Keep the whole gradients that every optimizer step gets, before it scales them."""
    optimizer = engine._trainer.optimizer  # what a caller cannot see, but a test must
    step = optimizer.step

    def seen(scale: float, lr: float) -> None:
        grads = {
            name: param.grad
            for name, param in engine._model.hf.named_parameters()
            if param.grad is not None
        }
        into.append({name: grad.full_tensor().clone() for name, grad in grads.items()})
        step(scale, lr)

    optimizer.step = seen


def one(folder: Path, name: str, case: dict[str, Any]) -> dict[str, Any]:
    settings = dict(case["config"])
    if settings.get("rollout_correction"):
        settings["rollout_correction"] = RolloutCorrectionConfig(**settings["rollout_correction"])
    engine = build(case["path"], case["role"], **settings)
    rows = MemoryRows(load_file(case["batch"]), **case["metadata"])
    found: list[dict[str, Tensor]] = []
    watch(engine, found)
    metrics, orders = [], []
    for _ in range(case["calls"]):
        prepared, plan = agreed_plan(engine, case["operation"], rows, **case["params"])
        engine.check(prepared, plan)
        metrics += [result.metrics for result in engine.update(prepared, plan)]
        orders += [sorted(mini.rows()) for mini in plan.mini_batches]
    tensors = {
        f"{step}/{key}": grad for step, grads in enumerate(found) for key, grad in grads.items()
    }
    save(folder, name, tensors | {f"end/{key}": value for key, value in weights(engine).items()})
    return {"metrics": metrics, "orders": orders, "packing": engine.info()["packing"]}


def cases(folder: Path, file: str) -> dict[str, Any]:
    return {
        name: one(folder, name, case) for name, case in json.loads(Path(file).read_text()).items()
    }


def memory(folder: Path, path: str, role: str) -> dict[str, Any]:
    """Bytes by which this process has grown with the group and one operation, and how many moments
    it holds."""
    before = resident()
    engine = build(path, role, dtype="float32")
    ids = torch.ones(2, 8).long()
    rows = MemoryRows({"input_ids": ids, "attention_mask": ids, "advantages": torch.ones(2)})
    operation = {"actor": "update_actor", "reward": "compute_rewards"}.get(role, "compute_log_prob")
    prepared, plan = agreed_plan(engine, operation, rows)
    engine.check(prepared, plan)
    (engine.update if operation == "update_actor" else engine.compute)(prepared, plan)
    names = [part.name for part in engine.state.shards()]
    return {
        "grown": resident() - before,
        "parameters": 4 * engine.info()["parameters"],
        "moments": sum(name.startswith("optim.") for name in names),
    }


def resident() -> int:
    """Without what is mapped from files: the loaded libraries and the model's folder."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    be_a_rank({"cases": cases, "memory": memory})
