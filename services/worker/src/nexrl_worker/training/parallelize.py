"""Shards a model with FSDP2: a function applied to an untouched model, the same at every world size."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from nexrl_worker.training.scorer import Scorer


def decoder_layers(hf: nn.Module) -> list[nn.Module]:
    """The blocks that a forward passes one after the other: what the family calls unsplittable, else the first list."""
    names = set(getattr(hf, "_no_split_modules", None) or ())
    layers = [module for module in hf.modules() if type(module).__name__ in names]
    if not layers:
        layers = list(next((module for module in hf.modules() if isinstance(module, nn.ModuleList)), []))
    return layers


def checkpoint_activations(hf: nn.Module) -> None:
    """Recompute every decoder layer in the backward; replaces the layers' forward, so no parameter changes its name."""
    for layer in decoder_layers(hf):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def shard(scorer: Scorer, mesh: DeviceMesh, param_dtype: torch.dtype | None, reduce_dtype: torch.dtype | None) -> None:
    """Shard each decoder layer, then the rest with the root, where embedding and head (maybe tied) stay together.

    `None` computes or reduces in the parameters' own dtype. The root is gathered once per forward and kept until its
    backward is over; after a forward without a backward, call `release`.
    """
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    for layer in decoder_layers(scorer.hf):
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(scorer, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def release(scorer: Scorer) -> None:
    """Free gathered parameters; without it a later forward would see the weights as they were when gathered."""
    for module in scorer.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
