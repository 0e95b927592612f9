"""Checks the worker's mathematics on one GPU: parity with the CPU, speed and memory against a plain
loop.

``python scripts/gpu_check.py [--out FOLDER] [--small]``: needs torch, transformers, numpy,
safetensors and pydantic, and of the service only this checkout. docs/gpu.md says more.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import safetensors
import torch
import torch.distributed as dist
import transformers

from gpu.actor import free, make_rows
from gpu.contest import EngineSide, PlainSide, contest
from gpu.page import page
from gpu.parity import parity
from gpu.shapes import eight_layers, half_billion, write_model

LIMIT_S = 420.0  # no new round begins after that: the whole takes eight minutes at most on an H100
Part = tuple[str, Callable[[], dict[str, Any]]]


def main(arguments: list[str]) -> int:
    """Run every part, write the report and print its page; 1 where a part failed, 2 without a
    GPU."""
    parser = argparse.ArgumentParser(description="Check the worker's mathematics on one GPU.")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", "runs")), help="folder of the report"
    )
    parser.add_argument(
        "--small", action="store_true", help="tiny models on the CPU: the script, not the device"
    )
    options = parser.parse_args(arguments)
    if not options.small and not torch.cuda.is_available():
        print("no CUDA device: --small runs the same on the CPU with tiny models", file=sys.stderr)
        return 2
    device = torch.device("cpu") if options.small else torch.device("cuda", 0)
    _prepare(device)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        folder = Path(name)
        dist.init_process_group(
            "gloo" if options.small else "cpu:gloo,cuda:nccl",  # the CPU's engines need a group too
            init_method=f"file://{folder / 'meeting'}", rank=0, world_size=1,
        )  # fmt: skip
        try:
            until = time.monotonic() + LIMIT_S
            report = run_parts(
                parts(folder, device, options.small, until), machine(device), options.out
            )
        finally:
            dist.destroy_process_group()
    print(page(report))
    return 1 if any(not part["ok"] for part in report["parts"].values()) else 0


def parts(folder: Path, device: torch.device, small: bool, until: float) -> dict[str, Part]:
    """By name: title, and what makes the part's result, whose `failed` lists what did not hold."""
    half, eight = half_billion(small), eight_layers(small)
    few = 1 if small else 3
    dtype = torch.float32 if small else torch.bfloat16
    made: dict[str, Path] = {}

    def run(
        shape: Any, makers: Mapping[str, Callable[..., Any]], padded: bool, rounds: int
    ) -> dict[str, Any]:
        if shape.name not in made:
            made[shape.name] = write_model(
                folder / f"model-{len(made)}", shape.config, device, dtype
            )
            free(device)
        rows = make_rows(shape, padded=padded)
        given = (made[shape.name], device, rows, shape.micro)
        sides = {name: partial(make, *given) for name, make in makers.items()}
        return contest(sides, shape, rows, device, rounds=rounds, steps=few, until=until)

    speed = {"engine": EngineSide, "plain loop": PlainSide}
    padding = {
        "engine, packed": partial(EngineSide, packing=True),
        "engine, padded": EngineSide,
        "plain loop": PlainSide,
    }
    memory = {
        "engine": partial(EngineSide, recompute=True),
        "engine, whole logits": partial(EngineSide, recompute=True, whole_logits=True),
        "plain loop": partial(PlainSide, recompute=True),
    }
    return {
        "parity": ("Parity with the CPU", partial(parity, folder, device)),
        "full": (f"{half.name}, full rows", partial(run, half, speed, False, few)),
        "padded": (
            f"{half.name}, rows of different lengths",
            partial(run, half, padding, True, few),
        ),
        "eight_layers": (
            f"{eight.name}, layers recomputed",
            partial(run, eight, memory, False, min(few, 2)),
        ),
    }


def run_parts(todo: Mapping[str, Part], machine: dict[str, Any], out: Path) -> dict[str, Any]:
    """Run each part whatever became of the one before; both files are written after each, so that
    what stands stays."""
    report: dict[str, Any] = {"machine": machine, "parts": {}}
    out.mkdir(parents=True, exist_ok=True)
    for name, (title, act) in todo.items():
        print(f"{title} ...", file=sys.stderr, flush=True)
        start = time.monotonic()
        part: dict[str, Any] = {"title": title}
        try:
            part["result"] = act()
            part["ok"] = not part["result"]["failed"]
        except Exception as error:
            traceback.print_exc()
            part |= {"error": f"{type(error).__name__}: {str(error)[:400]}", "ok": False}
        report["parts"][name] = part | {"seconds": time.monotonic() - start}
        (out / "gpu-check.json").write_text(json.dumps(report, indent=1) + "\n")
        (out / "gpu-check.md").write_text(page(report))
        # what was compiled for one model's shapes would count against the next one's limit
        torch.compiler.reset()
    return report


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    cuda = device.type == "cuda"
    facts: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(device)
        if cuda
        else f"CPU, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "safetensors": safetensors.__version__,
        "CUDA": torch.version.cuda or "none",
        "packed attention on CUDA": "FlashAttention"
        if find_spec("flash_attn")
        else "FlexAttention",
    }
    if cuda:
        facts["memory"] = f"{torch.cuda.get_device_properties(device).total_memory / 2**30:.1f} GiB"
        facts["cuDNN"] = str(torch.backends.cudnn.version())
        facts["NCCL"] = ".".join(str(number) for number in torch.cuda.nccl.version())
    return facts


def _prepare(device: torch.device) -> None:
    transformers.utils.logging.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = False
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's own name may lead nowhere
    if device.type == "cuda":
        torch.cuda.set_device(device)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
