"""``python -m benchmarks.soak MINUTES``: a group at full speed, and what it leaves behind minute by
minute.

Bounds may be lowered by the environment of the stack (docs/client.md), so that a short run shows
what a long one would.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import rich
import torch
from nexrl_client import HTTPTrainServiceClient
from nexrl_ledger import connect

from benchmarks.processes import Children
from benchmarks.stack import Stack, make_model

_ROWS, _LENGTH = 8, 64


class Left(NamedTuple):
    """What there is at one moment; bytes of files, the append-only file and logs."""

    steps: int
    files: int
    payload_bytes: int
    keys: int
    redis_bytes: int
    aof_bytes: int
    log_bytes: int


def soak(minutes: float, *, every_s: float = 60.0) -> list[Left]:
    """Steps of ``compute_log_prob`` and ``update_actor``, one after another; what is left after
    each ``every_s``."""
    with (
        tempfile.TemporaryDirectory(prefix="nexrl-soak-") as name,
        Children(Path(name)) as children,
    ):
        stack = Stack(children)
        model = make_model(
            Path(name) / "model",
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
        client = stack.group("student", model, 1)
        client.init_model()
        redis_url = _redis_url(stack)
        found: list[Left] = []
        rich.print("at", *Left._fields)
        end = next_look = time.monotonic()
        end += minutes * 60
        steps = 0
        while time.monotonic() < end:
            _step(client)
            steps += 1
            if time.monotonic() >= next_look:
                next_look += every_s
                found.append(_look(steps, stack.data / ".nexrl", redis_url))
                rich.print(time.strftime("%H:%M:%S"), *found[-1], flush=True)
        return found


def _step(client: HTTPTrainServiceClient) -> None:
    ids = torch.randint(0, 64, (_ROWS, _LENGTH))
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "responses": ids[:, -_LENGTH // 2 :],
    }
    scored = client.compute_log_prob({"tensors": batch})["batch"]["old_log_probs"]
    client.update_actor(
        {"tensors": {**batch, "old_log_probs": scored, "advantages": torch.ones(_ROWS)}}
    )


def _redis_url(stack: Stack) -> str:
    gateway = next(
        child
        for child in psutil.Process(stack.process.pid).children(recursive=True)
        if "nexrl_gateway" in child.cmdline()
    )
    return gateway.environ()["NEXRL_REDIS_URL"]


def _look(steps: int, own: Path, redis_url: str) -> Left:
    payloads = _sizes(own / "payloads")
    with connect(redis_url) as client:
        info = client.info()
    return Left(
        steps,
        len(payloads),
        sum(payloads),
        int(info["db0"]["keys"]),
        int(info["used_memory"]),
        sum(_sizes(own / "redis")),
        sum(_sizes(own / "logs")),
    )


def _sizes(folder: Path) -> list[int]:
    sizes = []
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                sizes.append(path.stat().st_size)
        except FileNotFoundError:
            continue
    return sizes


if __name__ == "__main__":
    soak(float(sys.argv[1]))
