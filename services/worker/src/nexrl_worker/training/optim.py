"""AdamW over a rank's own slices, and the learning-rate schedule.

AdamW works element by element, so running it on the local parts gives what it would give on whole
tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from nexrl_contract.sections import OptimConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nexrl_worker.training.model.weights import Shard
from nexrl_worker.training.model.wrapper import ModelWrapper
from nexrl_worker.training.torch_parts import norms

_MOMENTS = ("exp_avg", "exp_avg_sq")
_PIECE = 1024
# As transformers' `Trainer.get_decay_parameter_names` tells them, which needs a Trainer.
_NORMS_AND_BIASES = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


class Schedule:
    """Learning rate by number of optimizer steps already taken.

    A warm-up of n steps uses lr (t+1)/n at step t; then constant, or linear or cosine decay from lr
    to min_lr_ratio * lr, which is reached at total_training_steps.
    """

    def __init__(self, optim: OptimConfig) -> None:
        self._lr = optim.lr
        self._warmup = optim.lr_warmup_steps
        self._kind = optim.lr_scheduler
        self._total = optim.total_training_steps or 0  # above the warm-up where there is a decay
        self._floor = optim.min_lr_ratio

    def lr(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0."""
        if step < self._warmup:
            return self._lr * (step + 1) / self._warmup
        if self._kind == "constant":
            return self._lr
        done = min((step - self._warmup) / (self._total - self._warmup), 1.0)
        left = 1.0 - done if self._kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self._lr * (self._floor + (1.0 - self._floor) * left)


class Optimizer:
    """AdamW and gradient clipping for what trains of a sharded model, which keeps its parameters
    and gradients."""

    def __init__(self, model: ModelWrapper, optim: OptimConfig) -> None:
        self._params = model.named_trainable()
        self._shards = {part.name: part for part in model.trainable_shards()}
        self._local = {name: part.local_tensor for name, part in self._shards.items()}
        self._moments = {
            name: {kind: torch.zeros_like(local) for kind in _MOMENTS}
            for name, local in self._local.items()
        }
        spared = norms_and_biases(model.hf) if optim.no_decay else set()
        groups = _by_decay(self._local, spared, float(optim.weight_decay))
        self._adamw: torch.optim.AdamW | None = None
        if groups:
            self._adamw = torch.optim.AdamW(
                groups,
                lr=float(optim.lr),
                betas=(float(optim.betas[0]), float(optim.betas[1])),
                eps=float(optim.eps),
                fused=True,
            )
            for name, local in self._local.items():
                if local.numel():
                    start = torch.zeros((), dtype=torch.float32, device=local.device)
                    self._adamw.state[local] = {"step": start, **self._moments[name]}
        self._count = 0

    @property
    def steps(self) -> int:
        """AdamW's own step count, which its bias correction uses."""
        return self._count

    @steps.setter
    def steps(self, count: int) -> None:
        self._count = count
        if self._adamw is not None:
            for state in self._adamw.state.values():
                state["step"].fill_(float(count))

    def grad_norm(self) -> float:
        """L2 norm of the gradients as they stand, over all ranks. Collective."""
        device = next(iter(self._local.values())).device
        grads = [grad for grad in self._grads().values() if grad.numel()]
        total = torch.zeros((), dtype=torch.float64, device=device)
        if grads:
            total = piece_norms(grads).double().square().sum()
        dist.all_reduce(total)
        return float(total.sqrt())

    @torch.no_grad()
    def step(self, scale: float, lr: float) -> None:
        """One AdamW step on gradients times `scale`; the gradients are gone afterwards."""
        for name, grad in self._grads().items():
            if grad.numel():
                self._local[name].grad = grad.mul_(scale)
        if self._adamw is not None:
            for group in self._adamw.param_groups:
                group["lr"] = lr
            self._adamw.step()
        self._count += 1
        self.discard()

    def set_aside(self) -> dict[str, Tensor]:
        """Take the gradients away, for `put_back`."""
        kept = {name: param.grad for name, param in self._params.items() if param.grad is not None}
        self.discard()
        return kept

    @torch.no_grad()
    def put_back(self, kept: dict[str, Tensor]) -> None:
        """Add gradients that were `set_aside` to those of now."""
        for name, grad in kept.items():
            now = self._params[name].grad
            self._params[name].grad = grad if now is None else grad.add_(now)

    def discard(self) -> None:
        """Drop all gradients."""
        for name, param in self._params.items():
            param.grad = None
            self._local[name].grad = None

    def shards(self) -> Iterator[Shard]:
        """Both moments of every parameter, cut as it is: `optim.exp_avg.<name>` and the square."""
        for name, part in self._shards.items():
            for kind in _MOMENTS:
                yield replace(
                    part, name=f"optim.{kind}.{name}", local_tensor=self._moments[name][kind]
                )

    def _grads(self) -> dict[str, Tensor]:
        return {
            name: param.grad.to_local()
            for name, param in self._params.items()
            if isinstance(param.grad, DTensor)
        }


def norms_and_biases(hf: nn.Module) -> set[str]:
    """Names of the parameters of LayerNorms, and of those whose own name says norm or bias."""
    modules = hf.named_modules()
    norms = tuple(f"{name}." for name, module in modules if isinstance(module, nn.LayerNorm))
    names = (name for name, _ in hf.named_parameters())
    return {one for one in names if one.startswith(norms) or _NORMS_AND_BIASES.search(one.lower())}


def _by_decay(
    local: dict[str, Tensor], spared: set[str], weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW's parameter groups of this rank's slices, those that are empty left out."""
    groups: list[dict[str, Any]] = []
    for free, decay in ((False, weight_decay), (True, 0.0)):
        chosen = [part for name, part in local.items() if part.numel() and (name in spared) == free]
        groups += [{"params": chosen, "weight_decay": decay}] if chosen else []
    return groups


def piece_norms(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norms of pieces that make up the tensors, each small enough to be summed in its own dtype.

    The CPU sums squares one after the other: in float32 the norm of 40 million of them would be 0.3
    % off.
    """
    if tensors[0].device.type != "cpu":
        return norms(tensors)
    pieces: list[Tensor] = []
    for flat in (tensor.flatten() for tensor in tensors):
        whole = flat.numel() // _PIECE * _PIECE
        pieces.append(torch.linalg.vector_norm(flat[:whole].view(-1, _PIECE), dim=1))
        pieces.append(torch.linalg.vector_norm(flat[whole:])[None])
    return torch.cat(pieces)
