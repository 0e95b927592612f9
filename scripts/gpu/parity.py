"""Log-probabilities and gradients of one update: the engine on the device and on the CPU against a
plain float64 loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from nexrl_worker.training import Engine, Plan
from nexrl_worker.training.prepare import Prepared
from torch import Tensor

from gpu.actor import Rows, actor, free, make_rows
from gpu.plain import PlainLoop
from gpu.shapes import parity_shape, write_model

LIMIT = 1e-5  # relative L2, in float32 without TF32
_CPU = torch.device("cpu")


def parity(folder: Path, device: torch.device) -> dict[str, Any]:
    """Relative L2 deviations by way of computing; `failed` names ways above LIMIT (bfloat16 has
    none) or not packed."""
    shape = parity_shape()
    path = write_model(folder / "parity", shape.config, _CPU, torch.float32)
    rows = make_rows(shape, padded=True)
    ways: dict[str, tuple[torch.device, str, bool]] = {
        "CPU": (_CPU, "float32", False),
        "CPU, packed": (_CPU, "float32", True),
    }
    if device.type != "cpu":
        ways |= {"CUDA": (device, "float32", False), "CUDA, packed": (device, "float32", True)}
    name = device.type.upper()
    ways |= {
        f"{name}, bfloat16": (device, "bfloat16", False),
        f"{name}, bfloat16, packed": (device, "bfloat16", True),
    }
    wanted = _plain(path, rows, shape.micro)
    found = {way: _engine(path, rows, shape.micro, *settings) for way, settings in ways.items()}
    answer: dict[str, Any] = {
        "limit": LIMIT,
        "ways": {way: _deviations(one, wanted) for way, one in found.items()},
    }
    if "CUDA" in found:
        answer["CUDA from CPU"] = _deviations(found["CUDA"], found["CPU"])
    answer["failed"] = [
        f"{way}: above {LIMIT:g}"
        for way, gaps in answer["ways"].items()
        if "bfloat16" not in way and not max(gaps.values()) <= LIMIT
    ]
    unpacked = {way: one["packing_reason"] for way, one in found.items() if one["packing_reason"]}
    answer["failed"] += [f"{way}: not packed: {reason}" for way, reason in unpacked.items()]
    return answer


def _planned(engine: Engine, operation: str, rows: Rows) -> tuple[Prepared, Plan]:
    prepared = engine.prepare(operation, rows, {})
    return prepared, engine.plan(prepared, rows.lengths)


def _engine(
    path: Path, rows: Rows, micro: int, device: torch.device, dtype: str, packing: bool
) -> dict[str, Any]:
    """What one engine makes of the batch, on the CPU in float64."""
    engine = Engine.build(
        actor(path, packing=packing, dtype=dtype, ppo_micro_batch_size_per_gpu=micro),
        "actor",
        device,
    )
    answers = engine.compute(*_planned(engine, "compute_log_prob", rows)).answers["old_log_probs"]
    log_probs = torch.zeros(rows.size, rows.shape("input_ids")[1] - 1, dtype=torch.float64)
    for indices, values in answers:
        log_probs[indices] = values.double()
    engine.accumulate(*_planned(engine, "forward_backward", rows))
    tokens = sum(rows.lengths) - rows.size  # a row's first token is not scored
    grads: dict[str, Any] = {
        name: param.grad for name, param in engine._model.hf.named_parameters()
    }
    whole = {name: grad.full_tensor().double().cpu() / tokens for name, grad in grads.items()}
    engine.step(discard=True)
    [result] = engine.update(*_planned(engine, "update_actor", rows))
    reason = engine.info()["packing_reason"]
    del engine, grads
    free(device)
    norm = torch.tensor(result.metrics["actor/grad_norm"], dtype=torch.float64)
    return {"log_probs": log_probs, "grads": whole, "norm": norm, "packing_reason": reason}


def _plain(path: Path, rows: Rows, micro: int) -> dict[str, Any]:
    loop = PlainLoop(path, _CPU, micro, torch.float64)
    real = rows.tensors["attention_mask"][:, 1:]
    with torch.no_grad():
        log_probs = loop.log_probs(rows, slice(None)) * real
    loop.backward(rows)
    grads = {name: param.grad for name, param in loop.model.named_parameters()}
    norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
    return {"log_probs": log_probs, "grads": grads, "norm": norm}


def _deviations(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    names = sorted(wanted["grads"])
    if sorted(found["grads"]) != names:
        raise RuntimeError("the engine's parameters are not those of transformers' model")
    return {
        "log_probs": _gap(found["log_probs"], wanted["log_probs"]),
        "gradients": _gap(
            *(
                torch.cat([one["grads"][name].flatten() for name in names])
                for one in (found, wanted)
            )
        ),
        "gradient_norm": _gap(found["norm"], wanted["norm"]),
    }


def _gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
