"""Running a trainer of the examples as a program, and reading what it leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.helpers.stack import Stack

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run_demo(
    stack: Stack, name: str, *options: str, program: str = "grpo"
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Run the trainer to its end; its result and its run's folder."""
    folder = stack.data.parent / name
    command = [
        sys.executable,
        str(EXAMPLES / f"{program}.py"),
        "--url",
        stack.url,
        "--output",
        str(folder),
        *options,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=850), folder


def log_of(folder: Path, phase: str) -> list[dict[str, Any]]:
    """The lines of the run's log that belong to one phase."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["phase"] == phase]


def same_weights(one: Path, other: Path) -> bool:
    """Whether two model folders hold the same tensors, bit for bit."""
    first, second = (
        {
            name: tensor
            for file in folder.resolve().glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        for folder in (one, other)
    )
    return first.keys() == second.keys() and all(
        bool((first[name] == second[name]).all()) for name in first
    )
