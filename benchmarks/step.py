"""A training step through the service against a plain torchrun loop of the same model, batch and
world size."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from nexrl_client import HTTPTrainServiceClient
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.batches import Size, make_batch
from benchmarks.plain_loop import CLIP, GRAD_CLIP, LEARNING_RATE
from benchmarks.processes import Child, Children, free_port, module
from benchmarks.results import Findings, Measure, Table, ratios, spread
from benchmarks.stack import Stack, make_model

RANKS = 2
STEP_S = 1.5
LENGTH, FIRST_ROWS, MOST_ROWS = 128, 16, 256
MODEL = {
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "max_position_embeddings": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
_SAME_NORM = 0.02
METHOD = (
    "Seconds of client.update_actor(batch) on a group of two ranks under nexrl up, against one "
    "step of a plain loop "
    "(torchrun, two ranks, gloo, FSDP2 with the same sharding, full logits, log-softmax, "
    "PPO-clip, clip_grad_norm_, "
    "fused AdamW; its batch is in memory already). The same Llama of 12.6 million parameters from "
    "the same folder, "
    "float32, the same batch, as many rows as make a step last 1.5 s or more. Steps are taken in "
    "turns; who is not at "
    "its turn sleeps. Both must report the same gradient norm, or the run fails."
)


def run(folder: Path, repetitions: int, *, quick: bool) -> Findings:
    """Steps in turns."""
    found = Findings("A training step", METHOD)
    model = make_model(folder / "model", **MODEL)
    batch = make_batch(Size(MOST_ROWS, LENGTH))
    # Below the current policy's probabilities ratios would overflow; near them, some are clipped,
    # as in training.
    batch["old_log_probs"] = -math.log(MODEL["vocab_size"]) + 0.2 * torch.randn(
        batch["old_log_probs"].shape
    )
    save_file(batch, folder / "batch.safetensors")
    with Children(folder) as children:
        plain = _plain(children, model, folder / "batch.safetensors")
        stack = Stack(children)
        client = stack.group("step", model, RANKS, **_ACTOR)
        client.init_model()
        _measure(found, plain, client, batch, 3 if quick else max(repetitions, 7))
    return found


_ACTOR: dict[str, Any] = {
    "optim": {"lr": LEARNING_RATE, "weight_decay": 0.01},
    "grad_clip": GRAD_CLIP,
    "clip_ratio": CLIP,
}


def _plain(children: Children, model: Path, batch: Path) -> Child:
    command = module(
        "torch.distributed.run",
        "--nnodes=1",
        f"--nproc-per-node={RANKS}",
        "--master-addr=127.0.0.1",
    )
    command += [
        f"--master-port={free_port()}",
        "-m",
        "benchmarks.plain_loop",
        str(model),
        str(batch),
    ]
    threads = max(1, (os.cpu_count() or 1) // RANKS)
    child = children.start(
        "plain", command, {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"}, talks=True
    )
    child.listen()
    return child


def _measure(
    found: Findings,
    plain: Child,
    client: HTTPTrainServiceClient,
    batch: dict[str, Tensor],
    repetitions: int,
) -> None:
    rows = FIRST_ROWS
    plain_s, service_s = [], []
    for repetition in range(
        -2, repetitions
    ):  # the first two warm up, and the second one has the final size
        theirs, their_norm = json.loads(plain.ask(str(rows)))
        start = time.perf_counter()
        result = client.update_actor({name: tensor[:rows] for name, tensor in batch.items()})
        ours = time.perf_counter() - start
        norm = result["metrics"]["actor/grad_norm"]
        if not math.isclose(norm, their_norm, rel_tol=_SAME_NORM):
            raise RuntimeError(
                f"the two did not do the same work: gradient norms {norm} and {their_norm}"
            )
        if repetition == -2:
            rows = min(MOST_ROWS, FIRST_ROWS * max(1, math.ceil(STEP_S / theirs)))
        elif repetition >= 0:
            plain_s.append(theirs)
            service_s.append(ours)
            inside = result["meta_info"]["timing"]
    name = f"a step through the service over a plain one ({rows} x {LENGTH})"
    found.measures.append(Measure.of(name, ratios(service_s, plain_s), 1.05, at_least=False))
    details = [("plain loop", *spread(plain_s)), ("service, whole call", *spread(service_s))]
    details += [
        (f"service, {key} (last step)", f"{value:.3g}", "") for key, value in sorted(inside.items())
    ]
    found.tables.append(Table("Seconds of a step", ("what", "median", "spread"), details))
