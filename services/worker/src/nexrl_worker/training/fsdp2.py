"""All that this service needs of FSDP2, and the one place that knows its private parts.

Which they are, and that the installed torch has them, says tests/training/test_fsdp2_contract.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from nexrl_worker.training.observe.costs import is_out_of_memory


class Collective:
    """The all-gathers or the reduce-scatters of one sharded module, in the place of FSDP2's own.

    It counts them, so that a rank that has left a micro-batch on the way can go through it again,
    to issue those that the other ranks wait for and no other. `done` says whether a micro-batch
    finds one done before.
    """

    def __init__(self, done: Callable[[], bool] = lambda: False) -> None:
        self._done = done
        self.measure: Callable[[], AbstractContextManager[None]] = nullcontext
        self._issued = 0
        self._skips = 0

    def begin(self) -> None:
        """A micro-batch begins."""
        self._issued, self._skips = int(self._done()), 0

    def again(self) -> None:
        """The same micro-batch begins once more: as many as were issued until now only fill their
        outputs with 0."""
        self._skips = self._issued

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for a buffer."""
        return torch.empty(*size, dtype=dtype, device=device)

    def _issue(self, output: Tensor, issue: Callable[[], Any]) -> Any:
        if self._skips:
            self._skips -= 1
            output.zero_()
            return None
        with self.measure():
            try:
                work = issue()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise dist.DistError(
                    f"out of memory in a collective that may have begun: {error}"
                ) from error
        self._issued += 1
        return work


class AllGather(Collective):
    """As FSDP2 asks of a custom one."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> Any:
        """`input_tensor` of every rank in `output_tensor`."""
        # torch 2.13 renamed it.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return self._issue(
            output_tensor,
            lambda: gather(output_tensor, input_tensor, group=group, async_op=async_op),
        )


class ReduceScatter(Collective):
    """As FSDP2 asks of a custom one."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        """This rank's part of the sum over ranks in `output_tensor`."""
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        return self._issue(
            output_tensor,
            lambda: scatter(output_tensor, input_tensor, group=group, op=op, async_op=async_op),
        )


def shard(
    model: nn.Module,
    layers: Iterable[nn.Module],
    mesh: DeviceMesh,
    param_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
) -> list[Collective]:
    """Shard each of the layers, then the rest as the root, where all that is tied stays together;
    the collectives that will do the work.

    A function applied to an untouched model, the same at every world size. `None` computes or
    reduces in the parameters' own dtype. The root is gathered once per forward and kept until its
    backward is over; after a forward without a backward, call `release`.
    """
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    collectives: list[Collective] = []
    for module in sharded_modules(model):
        gather, scatter = AllGather(partial(_is_gathered, module)), ReduceScatter()
        module.set_custom_all_gather(gather)  # a protocol in all but name
        module.set_custom_reduce_scatter(scatter)
        collectives += [gather, scatter]
    return collectives


def release(model: nn.Module) -> None:
    """Free gathered parameters; without it a later forward would see the weights as they were when
    gathered.

    Also forgets the order of forwards that FSDP keeps for a backward: where none comes it would
    grow for ever.
    """
    for module in sharded_modules(model):
        module.reshard()
        for group in _groups(module):
            order = getattr(group.comm_ctx, "post_forward_order", None)  # None before a forward
            if order is not None:
                order.clear()
            group._post_forward_indices.clear()


def synchronise(model: nn.Module, on: bool) -> None:
    """Whether the next backward adds its gradients up over ranks, with all that earlier ones kept
    back.

    Call before each micro-batch's forward with `on` true at the last micro-batch of an
    accumulation, so that nothing is kept back between operations. Kept-back gradients are whole on
    every rank, in the reduction's dtype: one reduce-scatter per accumulation instead of one per
    micro-batch, for world-size times the gradients' memory.
    """
    model.set_requires_gradient_sync(on)  # type: ignore[operator]  # FSDP has made the model an FSDPModule


def forget_kept_back(model: nn.Module) -> None:
    """Drop gradients that `synchronise(model, False)` kept back, and what an error in a forward or
    backward left gathered.

    Call after such an error, and wherever sharded gradients are dropped too; those are the caller's
    own.
    """
    reset(model)
    for module in sharded_modules(model):
        for group in _groups(module):
            for param in group.fsdp_params:
                param.unsharded_accumulated_grad = None
                if hasattr(param, "_unsharded_param"):
                    param._unsharded_param.grad = None
    synchronise(model, True)


def can_reset(model: nn.Module) -> bool:
    """Whether `reset` does anything: torch has what it needs since 2.13."""
    return hasattr(model, "reset_iter_state")


def reset(model: nn.Module) -> None:
    """Put FSDP back to before a forward, after an error in one or in a backward; keeps gradients
    that were kept back. Before torch 2.13 a model that was left stays gathered."""
    if can_reset(model):
        model.reset_iter_state()  # type: ignore[operator]


def _is_gathered(module: FSDPModule) -> bool:
    return any(group.is_unsharded for group in _groups(module))


def sharded_modules(model: nn.Module) -> list[Any]:
    """The root and the layers, each of which is gathered as a whole: modules and FSDPModules."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _groups(module: FSDPModule) -> list[Any]:
    """FSDP's record of a module's parameters: torch 2.11 has one, later ones may have several."""
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group for group in groups if group is not None]
