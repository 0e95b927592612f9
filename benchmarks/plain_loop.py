"""The training loop that one writes without a service: torchrun, FSDP2, full logits, PPO. One step
for each line read.

``torchrun -m benchmarks.plain_loop MODEL BATCH``: a line says how many rows of the batch to train
on; the answer is JSON with the step's seconds and the gradient's norm.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nexrl_host.processes import die_with_parent
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

LEARNING_RATE, CLIP, GRAD_CLIP = 1e-4, 0.2, 1.0


@dataclass(frozen=True, slots=True)
class Loop:
    """One rank's model, optimizer, and the whole batch."""

    model: Any
    optimizer: torch.optim.AdamW
    batch: dict[str, Tensor]

    def step(self, rows: int) -> float:
        """One PPO step on the batch's first ``rows``, each rank on its share; the gradient's
        norm."""
        rank, world = dist.get_rank(), dist.get_world_size()
        mine = {
            name: tensor[rows * rank // world : rows * (rank + 1) // world]
            for name, tensor in self.batch.items()
        }
        inputs = {name: mine[name] for name in ("input_ids", "attention_mask", "position_ids")}
        logits = self.model(**inputs, use_cache=False).logits[:, :-1].float()
        log_probs = torch.log_softmax(logits, dim=-1)
        log_probs = log_probs.gather(-1, mine["input_ids"][:, 1:, None]).squeeze(-1)
        mask = (mine["loss_mask"] * mine["attention_mask"])[:, 1:].float()
        ratio = torch.exp(log_probs - mine["old_log_probs"][:, 1:])
        advantages = mine["advantages"][:, 1:]
        gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
        count = mask.sum()
        dist.all_reduce(count)
        loss = -(gain * mask).sum() / count
        (loss * world).backward()  # type: ignore[no-untyped-call]  # FSDP averages over ranks
        norm: Any = torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRAD_CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm.full_tensor())


def main(model_folder: str, batch_file: str) -> None:
    """Serve steps until the input ends."""
    die_with_parent(os.getppid())
    dist.init_process_group("gloo")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.get_world_size()))
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True
    )
    loop = Loop(model, optimizer, load_file(Path(batch_file)))
    if dist.get_rank() == 0:
        _say("ready")
    while (rows := _next_rows()) > 0:
        start = time.perf_counter()
        norm = loop.step(rows)
        dist.barrier()
        if dist.get_rank() == 0:
            _say(json.dumps([time.perf_counter() - start, norm]))
    dist.destroy_process_group()


def _next_rows() -> int:
    """Rank 0 reads a line and tells the others; 0 at the end."""
    rows = torch.zeros(1, dtype=torch.int64)
    if dist.get_rank() == 0:
        rows[0] = int(sys.stdin.readline() or "0")
    dist.broadcast(rows, src=0)
    return int(rows)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
