"""Updates of the engine and of the plain loop on one device, in turning order: seconds, memory, and
what the engine says."""

from __future__ import annotations

import statistics
import time
import traceback
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from nexrl_worker.training import Engine
from nexrl_worker.training.observe.costs import peak_memory
from torch import nn

from gpu.actor import Rows, actor, free
from gpu.plain import PlainLoop
from gpu.shapes import Shape, peak_flops, step_flops

SAME_NORM = 0.05  # of gradient norms, relative: bfloat16 differs, another loss would differ more
_WARM_UP = 2


class Side(Protocol):
    """One way of making an update, with its `model` loaded; `told` is what it says of itself."""

    model: nn.Module
    told: dict[str, Any]

    def step(self) -> tuple[float, Mapping[str, float]]:
        """The gradient's norm, and seconds by part."""
        ...


class EngineSide:
    """The worker's engine; `whole_logits`: with the family's own logits instead of chunks of the
    head."""

    def __init__(
        self, path: Path, device: torch.device, rows: Rows, micro: int, *,
        packing: bool = False, recompute: bool = False, whole_logits: bool = False,
    ) -> None:  # fmt: skip
        settings = actor(
            path, packing=packing, recompute=recompute, ppo_micro_batch_size_per_gpu=micro
        )
        self._engine = Engine.build(settings, "actor", device)
        if packing and not self._engine.info()["packing"]:
            raise RuntimeError(f"it does not pack: {self._engine.info()['packing_reason']}")
        self.model: nn.Module = self._engine._model
        self._prepared = self._engine.prepare("update_actor", rows, {})
        self._plan = self._engine.plan(self._prepared, rows.lengths)
        found = self._engine._probe
        self.told = {key: value for key, value in self._engine.info().items() if "steps" not in key}
        self.told |= {
            "chunked_difference": found.difference,
            "packed_difference": found.packed_difference,
        }
        self.told["estimated_peak_mib"] = self._engine.explain(
            self._prepared, self._plan, rows.lengths
        )["peak_memory_mib"]
        if whole_logits:
            self._engine._model.fallback = "whole logits were asked for"  # type: ignore[assignment]
            self.told |= {
                "chunked_log_probs": False,
                "chunked_log_probs_reason": "whole logits were asked for",
            }
            del self.told["estimated_peak_mib"]  # it is that of the chunks

    def step(self) -> tuple[float, Mapping[str, float]]:
        [result] = self._engine.update(self._prepared, self._plan)
        parts = {key: value for key, value in result.metrics.items() if key.startswith("time/")}
        return float(result.metrics["actor/grad_norm"]), parts


class PlainSide:
    """The plain loop, in the dtype that the engine computes in."""

    def __init__(
        self, path: Path, device: torch.device, rows: Rows, micro: int, *, recompute: bool = False
    ) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._loop = PlainLoop(path, device, micro, dtype, recompute=recompute)
        self.model: nn.Module = self._loop.model
        self._rows = rows
        self.told: dict[str, Any] = {}

    def step(self) -> tuple[float, Mapping[str, float]]:
        return self._loop.step(self._rows), {}


@dataclass
class _Samples:
    seconds: list[float] = field(default_factory=list)
    parts: list[Mapping[str, float]] = field(default_factory=list)
    norm: float = float("nan")
    peak_mib: float = 0.0
    held_mib: float = 0.0
    told: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def contest(
    makers: Mapping[str, Callable[[], Side]], shape: Shape, rows: Rows, device: torch.device,
    *, rounds: int, steps: int, until: float,
) -> dict[str, Any]:  # fmt: skip
    """Each side's median step, tokens/s, FLOPs utilisation and peak; the first side is compared
    with the others.

    In every round each side is built anew and alone on the device, warmed up, timed for `steps`,
    and freed. A side that fails is left out from then on, its error in `failed`. No round begins
    after `until` (time.monotonic).
    """
    samples = {name: _Samples() for name in makers}
    for number in range(rounds):
        names = list(makers) if number % 2 == 0 else list(reversed(makers))
        for name in names if number == 0 or time.monotonic() < until else []:
            if samples[name].error is None:
                _attempt(makers[name], samples[name], device, steps)
    answer = {name: _account(one, shape, rows, device) for name, one in samples.items()}
    failed = [f"{name}: {one.error}" for name, one in samples.items() if one.error is not None]
    first = next(iter(samples.values()))
    for name, one in samples.items():
        if one.seconds and first.seconds and not abs(one.norm / first.norm - 1.0) <= SAME_NORM:
            failed.append(
                f"{name}: gradient norm {one.norm:.6g}, the first side's is {first.norm:.6g}"
            )
    return {
        "model": shape.name, "rows": rows.size, "length": shape.length,
        "micro_batch_rows": shape.micro,
        "tokens": sum(rows.lengths),
        "padding_share": 1.0 - sum(rows.lengths) / (rows.size * shape.length),
        "parameters": first.told.get("parameters"), "sides": answer, "failed": failed,
    }  # fmt: skip


def _attempt(make: Callable[[], Side], into: _Samples, device: torch.device, steps: int) -> None:
    model: weakref.ref[nn.Module] | None = None
    try:
        model = _measure(make(), into, device, steps)
    except Exception as error:
        traceback.print_exc()
        into.error = f"{type(error).__name__}: {str(error)[:400]}"
    free(device)
    if model is not None and model() is not None:
        into.error = "its model is still in memory, beside those that come after it"


def _measure(
    side: Side, into: _Samples, device: torch.device, steps: int
) -> weakref.ref[nn.Module]:
    into.told = side.told
    for number in range(-_WARM_UP, steps):
        with peak_memory(device) as peak:
            _wait(device)
            start = time.perf_counter()
            norm, parts = side.step()
            _wait(device)
            spent = time.perf_counter() - start
        into.peak_mib = max(into.peak_mib, peak.mib)
        into.held_mib = peak.before
        if number == -_WARM_UP:
            into.norm = norm
        if number >= 0:
            into.seconds.append(spent)
            into.parts.append(parts)
    return weakref.ref(side.model)


def _account(one: _Samples, shape: Shape, rows: Rows, device: torch.device) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "peak_mib": one.peak_mib,
        "held_mib": one.held_mib,
        "gradient_norm": one.norm,
    }
    answer |= {"told": one.told, "error": one.error}
    if one.seconds:
        middle = statistics.median(one.seconds)
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        answer |= {
            "step_s": middle, "fastest_s": min(one.seconds), "slowest_s": max(one.seconds),
            "samples": len(one.seconds),
            "tokens_per_s": sum(rows.lengths) / middle,
            "utilisation": None if peak is None
            else step_flops(shape.config, rows.lengths) / middle / peak,
            "parts_s": {
                key: statistics.median(part[key] for part in one.parts) for key in one.parts[0]
            },
        }  # fmt: skip
    return answer


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
