"""The report as a page: what ran where, and a table for each part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

_EXPLAINED = """\
Tokens per second count real tokens. Utilisation is (6 N_matmul + 12 L H d S) x tokens/s over the \
device's dense bf16 peak, S the sum of squared lengths over the sum of lengths; recomputation is \
not counted, nor is the causal half of attention taken off. The plain loop is one process of \
plain torch and transformers: the model in bfloat16 (float32 on a CPU) with float32 master \
weights, gradients and moments, fused AdamW, transformers' whole logits, log-softmax in float32, \
PPO-clip, the same batch and micro-batches; it reports no entropy, clip fractions or quantiles. \
Every side is built anew and alone in each round; its first two steps are not timed. Peak memory \
is the most that was allocated on the device (on a CPU: resident), weights and optimizer \
included."""


def page(report: dict[str, Any]) -> str:
    """Markdown of the whole report."""
    machine = report["machine"]
    lines = [f"# GPU check of {machine['date']}, {machine['device']}", ""]
    lines += ["Made by `scripts/gpu_check.py`; docs/gpu.md says how. " + _EXPLAINED, ""]
    lines += _table(("machine", ""), [(key, str(value)) for key, value in machine.items()])
    for name, part in report["parts"].items():
        lines += [f"## {part['title']}", ""]
        failed = [part["error"]] if "error" in part else part["result"]["failed"]
        lines += [f"- **failed**: {_cell(failure)}" for failure in failed] + (
            [""] if failed else []
        )
        if "result" in part:
            lines += _parity(part["result"]) if name == "parity" else _contest(part["result"])
    return "\n".join(lines).rstrip() + "\n"


def _parity(result: dict[str, Any]) -> list[str]:
    ways = dict(result["ways"])
    if "CUDA from CPU" in result:
        ways["CUDA from CPU, both float32"] = result["CUDA from CPU"]
    header = ("engine on", "log-probabilities", "gradients", "gradient norm")
    cells = [
        (way, *(f"{gaps[key]:.2g}" for key in ("log_probs", "gradients", "gradient_norm")))
        for way, gaps in ways.items()
    ]
    text = (
        "Relative L2 deviation from a plain float64 loop on the CPU; in float32 (TF32 off) at "
        f"most {result['limit']:g}."
    )
    return [text, "", *_table(header, cells)]


def _contest(result: dict[str, Any]) -> list[str]:
    sides: dict[str, Any] = result["sides"]
    lines = [
        f"{result['model']}, {_number(result['parameters'])} parameters; {result['rows']} rows of "
        "up to "
        f"{result['length']} tokens in micro-batches of {result['micro_batch_rows']}: "
        f"{result['tokens']} real tokens, "
        f"{result['padding_share']:.0%} padding.",
        "",
    ]
    header = (
        "update",
        "step s",
        "spread",
        "tokens/s",
        "utilisation",
        "peak MiB",
        "held before",
        "explain's peak",
        "gradient norm",
    )
    lines += _table(header, [_side(name, side) for name, side in sides.items()])
    lines += _comparisons(sides)
    told = [(name, *_told(side["told"])) for name, side in sides.items() if side["told"]]
    lines += _table(
        (
            "what the probe said",
            "chunked log-probabilities",
            "packing",
            "difference: chunked",
            "packed",
        ),
        told,
    )
    parts = {name: side["parts_s"] for name, side in sides.items() if side.get("parts_s")}
    if parts:
        keys = list(next(iter(parts.values())))
        lines += _table(
            ("seconds of a step", *keys),
            [(name, *(f"{one[key]:.3g}" for key in keys)) for name, one in parts.items()],
        )
    return lines


def _side(name: str, side: dict[str, Any]) -> tuple[str, ...]:
    estimate = side["told"].get("estimated_peak_mib")
    measured = (
        ""
        if estimate is None or not side["peak_mib"]
        else f"{estimate:.0f} ({estimate / side['peak_mib'] - 1:+.0%})"
    )
    memory = (
        f"{side['peak_mib']:.0f}",
        f"{side['held_mib']:.0f}",
        measured,
        f"{side['gradient_norm']:.5g}",
    )
    if "step_s" not in side:
        return name, "failed", "", "", "", *memory
    spread = f"{side['fastest_s']:.3g} to {side['slowest_s']:.3g} ({side['samples']})"
    used = "" if side["utilisation"] is None else f"{side['utilisation']:.1%}"
    return name, f"{side['step_s']:.4g}", spread, f"{side['tokens_per_s']:.0f}", used, *memory


def _comparisons(sides: dict[str, Any]) -> list[str]:
    (first, one), *others = sides.items()
    lines = [
        f"- {first} takes {one['step_s'] / other['step_s']:.3f} times the step of: {name}; "
        f"{one['peak_mib'] / other['peak_mib']:.2f} times its peak."
        for name, other in others
        if "step_s" in one and "step_s" in other
    ]
    return [*lines, ""] if lines else []


def _told(told: dict[str, Any]) -> tuple[str, ...]:
    return (
        _yes(told["chunked_log_probs"], told["chunked_log_probs_reason"]),
        _yes(told["packing"], told["packing_reason"]),
        *(
            "" if math.isnan(told[key]) else f"{told[key]:.2g}"
            for key in ("chunked_difference", "packed_difference")
        ),
    )


def _yes(on: bool, reason: str | None) -> str:
    return "yes" if on else f"no: {reason}" if reason else "no"


def _number(count: int | None) -> str:
    return "unknown" if count is None else f"{count:,}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in (header, *rows)]
    return [lines[0], "| --- |" + " ---: |" * (len(header) - 1), *lines[1:], ""]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
