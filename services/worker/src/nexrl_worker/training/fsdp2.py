"""Shards a model with FSDP2: a function applied to an untouched model, the same at every world
size."""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.model.wrapper import ModelWrapper
from nexrl_worker.training.observe.clock import AllGather, Collective, ReduceScatter
from nexrl_worker.training.observe.memory import give_back, is_out_of_memory

Answer = TypeVar("Answer")
_log = logging.getLogger(__name__)


def decoder_layers(hf: nn.Module) -> list[nn.Module]:
    """The blocks that a forward passes one after the other: what the family calls unsplittable,
    else the first list."""
    names = set(getattr(hf, "_no_split_modules", None) or ())
    lists = [module for module in hf.modules() if isinstance(module, nn.ModuleList)]
    layers = {module: None for found in lists for module in found if type(module).__name__ in names}
    if not layers:
        return list(lists[0]) if lists else []
    inner = {part for layer in layers for part in layer.modules() if part is not layer}
    return [layer for layer in layers if layer not in inner]


def sharded_layers(hf: nn.Module) -> list[nn.Module]:
    """The decoder layers that FSDP gathers one by one: those that share no weight with another part
    (Zamba's blocks do)."""
    layers = decoder_layers(hf)
    inner = {part for layer in layers for part in layer.modules()}
    holders = Counter(param for layer in layers for param in set(layer.parameters()))
    holders.update(
        param
        for part in hf.modules()
        if part not in inner
        for param in part.parameters(recurse=False)
    )
    return [layer for layer in layers if all(holders[param] == 1 for param in layer.parameters())]


def checkpoint_activations(hf: nn.Module) -> None:
    """Recompute every decoder layer in the backward; replaces the layers' forward, so no parameter
    changes its name."""
    for layer in decoder_layers(hf):
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )


def compile_layers(hf: nn.Module, device: torch.device) -> None:
    """Compile every decoder layer's forward; call before `checkpoint_activations` and `shard`,
    whose hooks stay outside.

    Replaces the layers' forward, so no parameter changes its name. Raises InvalidValue where no
    compiler is found.
    """
    missing = missing_compiler(device)
    if missing is not None:
        raise InvalidValue(
            f"actor.model.use_torch_compile needs {missing}", expected="false", actual="true"
        )
    for layer in decoder_layers(hf):
        layer.forward = torch.compile(layer.forward, dynamic=True)


def missing_compiler(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine, None if it lacks nothing."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            return "Triton"
        # Triton builds in C what starts its kernels.
        found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        return None if found else "a C compiler (install gcc, or name one in CC)"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "a C++ compiler (install g++, or name one in CXX)"
    return None


def shard(
    model: ModelWrapper,
    mesh: DeviceMesh,
    param_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
) -> None:
    """Shard each decoder layer, then the rest as the root, where all that is tied stays together.

    `None` computes or reduces in the parameters' own dtype. The root is gathered once per forward
    and kept until its backward is over; after a forward without a backward, call `release`.
    """
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    for layer in sharded_layers(model.hf):
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in _sharded(model):
        gather, scatter = AllGather(partial(_is_gathered, module)), ReduceScatter()
        module.set_custom_all_gather(gather)  # type: ignore[arg-type]  # a protocol in all but name
        module.set_custom_reduce_scatter(scatter)  # type: ignore[arg-type]
        model.collectives += [gather, scatter]


def release(model: ModelWrapper) -> None:
    """Free gathered parameters; without it a later forward would see the weights as they were when
    gathered.

    Also forgets the order of forwards that FSDP keeps for a backward: where none comes it would
    grow for ever.
    """
    for module in _sharded(model):
        module.reshard()
        for group in _groups(module):
            order = getattr(
                group.comm_ctx, "post_forward_order", None
            )  # not before a first forward
            if order is not None:
                order.clear()
            group._post_forward_indices.clear()


def synchronise(model: ModelWrapper, on: bool) -> None:
    """Whether the next backward adds its gradients up over ranks, with all that earlier ones kept
    back.

    Call before each micro-batch's forward with `on` true at the last micro-batch of an
    accumulation, so that nothing is kept back between operations. Kept-back gradients are whole on
    every rank, in the reduction's dtype: one reduce-scatter per accumulation instead of one per
    micro-batch, for world-size times the gradients' memory.
    """
    model.set_requires_gradient_sync(on)  # type: ignore[operator]  # FSDP has made the model an FSDPModule


def attempt(
    models: Sequence[ModelWrapper],
    device: torch.device,
    act: Callable[[Sequence[int]], Answer],
    rows: Sequence[int],
) -> tuple[Answer | None, bool]:
    """`act` on the rows of a micro-batch, and False; True where memory ran out on this rank, and
    the answer is of no rows.

    `act` runs forwards, and a backward, of `models`. The other ranks learn of a failure at the next
    vote alone: until then this rank must go on with micro-batches of no rows, as its gathered
    weights and gradients are worthless. What the failed one has not issued of its collectives it
    issues here, in `act` without rows (None: there are no others). Raises what `act` raises
    besides, and what the torch before 2.13 cannot put right. After the vote, call `drop`.
    """
    for collective in _collectives(models):
        collective.begin()
    try:
        return act(rows), False
    except Exception as error:
        alone = dist.get_world_size() == 1
        if (
            not is_out_of_memory(error)
            or isinstance(error, dist.DistError)
            or not (alone or _can_reset(models))
        ):
            raise
        # Not the error itself: a record that is kept would keep the tensors of the failed
        # micro-batch alive.
        _log.warning("memory.short rows=%d %s", len(rows), str(error))
    # Out of the block, for the same reason.
    for model in models:
        _reset(model)
    give_back(device)
    if alone:
        return None, True
    for collective in _collectives(models):
        collective.again()
    return act(()), True


def drop(models: Sequence[ModelWrapper]) -> None:
    """Leave nothing of the micro-batches since the last step gathered or kept back; sharded
    gradients are the caller's."""
    for model in models:
        forget_kept_back(model)
        release(model)


def forget_kept_back(model: ModelWrapper) -> None:
    """Drop gradients that `synchronise(model, False)` kept back, and what an error in a forward or
    backward left gathered.

    Call after such an error, and wherever sharded gradients are dropped too; those are the caller's
    own.
    """
    _reset(model)
    for module in _sharded(model):
        for group in _groups(module):
            for param in group.fsdp_params:
                param.unsharded_accumulated_grad = None
                if hasattr(param, "_unsharded_param"):
                    param._unsharded_param.grad = None
    synchronise(model, True)


def _collectives(models: Sequence[ModelWrapper]) -> Iterator[Collective]:
    return (collective for model in models for collective in model.collectives)


def _can_reset(models: Sequence[ModelWrapper]) -> bool:
    return all(hasattr(model, "reset_iter_state") for model in models)


def _reset(model: ModelWrapper) -> None:
    """Put FSDP back to before a forward, after an error in one or in a backward; keeps gradients
    that were kept back."""
    reset = getattr(
        model, "reset_iter_state", None
    )  # torch has it since 2.13; before, a left model stays gathered
    if reset is not None:
        reset()


def _is_gathered(module: FSDPModule) -> bool:
    return any(group.is_unsharded for group in _groups(module))


def _sharded(model: ModelWrapper) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def _groups(module: FSDPModule) -> list[Any]:
    """FSDP's own record of a module's parameters: torch 2.11 has one, later ones may have
    several."""
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group for group in groups if group is not None]
