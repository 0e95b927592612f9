"""What fsdp2.py takes for granted of FSDP2's private parts: what breaks here at an upgrade of torch
is the upgrade's price, and is mended in that file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nexrl_worker.training import fsdp2
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

TRAINING = Path(fsdp2.__file__).parent
PRIVATE = (
    "_get_fsdp_state",
    "_fsdp_param_group",
    "_post_forward_indices",
    "_unsharded_param",
    "post_forward_order",
    "reset_iter_state",
    "set_custom_all_gather",
)


class Model(nn.Module):
    """A root with one layer, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.layer(x))
        return result


@pytest.fixture
def model(one_rank: None) -> Any:
    found: Any = Model()
    mesh = init_device_mesh("cpu", (1,))
    found.collectives = fsdp2.shard(found, [found.layer], mesh, None, None)
    return found


def groups(model: nn.Module) -> list[Any]:
    return [group for part in fsdp2.sharded_modules(model) for group in fsdp2._groups(part)]


def test_nobody_else_knows_the_private_parts() -> None:
    files = [path for path in TRAINING.rglob("*.py") if path.name != "fsdp2.py"]
    found = [(path.name, word) for path in files for word in PRIVATE if word in path.read_text()]
    assert found == []


def test_every_sharded_module_has_one_record_of_its_parameters(model: Any) -> None:
    parts = fsdp2.sharded_modules(model)
    assert parts == [model, model.layer] and all(isinstance(part, FSDPModule) for part in parts)
    assert [len(group.fsdp_params) for group in groups(model)] == [2, 2]


def test_the_custom_collectives_do_the_work_and_the_root_stays_gathered(model: Any) -> None:
    """The root is kept until its backward is over; `release` frees it."""
    for collective in model.collectives:
        collective.begin()
    model(torch.ones(1, 4))
    gathers = [one for one in model.collectives if isinstance(one, fsdp2.AllGather)]
    assert len(gathers) == 2
    assert [group.is_unsharded for group in groups(model)] == [True, False]
    fsdp2.release(model)
    assert all(isinstance(param, DTensor) for param in model.parameters())
    assert not any(group.is_unsharded for group in groups(model))


def test_forwards_without_a_backward_leave_no_trace(model: Any) -> None:
    """FSDP2 notes the order of forwards for a backward's prefetch; `release` forgets it."""
    model(torch.ones(1, 4))
    assert any(group._post_forward_indices for group in groups(model))
    fsdp2.release(model)
    for group in groups(model):
        assert not group._post_forward_indices and not group.comm_ctx.post_forward_order


def test_gradients_kept_back_are_forgotten(model: Any) -> None:
    """They wait in FSDP2's own parameters, whole and in the reduction's dtype."""
    fsdp2.synchronise(model, False)
    model(torch.ones(1, 4)).sum().backward()
    assert all(param.grad is None for param in model.parameters())
    kept = [param for group in groups(model) for param in group.fsdp_params]
    assert all(
        param.unsharded_accumulated_grad is not None or param._unsharded_param.grad is not None
        for param in kept
    )
    fsdp2.forget_kept_back(model)
    fsdp2.release(model)
    model(torch.ones(1, 4)).sum().backward()
    assert model.head.bias.grad.full_tensor().tolist() == [1.0, 1.0]  # of the last one alone
    fsdp2.release(model)


def test_a_root_left_by_an_error_can_be_put_back(model: Any) -> None:
    def fail(module: nn.Module, args: object) -> None:
        raise MemoryError

    hook = model.head.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        model(torch.ones(1, 4))
    hook.remove()
    fsdp2.reset(model)
    fsdp2.release(model)
    if fsdp2.can_reset(model):
        assert model(torch.ones(1, 4)).shape == (1, 2)
        fsdp2.release(model)


def test_torch_has_the_collectives_that_fsdp2_is_given() -> None:
    for new, old in (
        ("all_gather_single", "all_gather_into_tensor"),
        ("reduce_scatter_single", "reduce_scatter_tensor"),
    ):
        assert hasattr(dist, new) or hasattr(dist, old)
