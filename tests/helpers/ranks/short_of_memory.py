"""Two ranks of which one runs out of memory, at any place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nexrl_worker.training import Engine, micro_batch_loop
from nexrl_worker.training.errors import DoesNotFit
from nexrl_worker.training.fsdp2 import Collective
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.engines import batch, planned
from tests.helpers.rank_processes import be_a_rank
from tests.helpers.ranks.engine import build, collect, run, weights

CUT = {"ppo_micro_batch_size_per_gpu": 2}
ROWS = batch(8)  # on each rank two micro-batches of two rows
ROWS.tensors["returns"] = ROWS.tensors["old_log_probs"]
del ROWS.tensors["ref_log_prob"]  # a KL term then takes the frozen reference
REFERENCE = {"use_kl_loss": True, "kl_loss_coef": 0.2}
SETTINGS: dict[str, dict[str, Any]] = {
    "everything": {**CUT, **REFERENCE, "gradient_sync": "mini_batch", "recompute": True},
    "kept back": {**CUT, "gradient_sync": "mini_batch"},
    "reduced at once": CUT,
    "recompute": {**CUT, "recompute": True},
    "packed": {**CUT, "packing": True},
    "frozen reference": {**CUT, **REFERENCE},
}


class OutOfMemoryAt(TorchDispatchMode):
    """Counts torch's calls, forward, backward and FSDP's own, and lets the one numbered `at`
    fail."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__()
        self.at = at
        self.count = 0
        self.communicates = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not self.communicates
        if self.count == self.at and not self.communicates:
            raise torch.OutOfMemoryError(f"CUDA out of memory (in {func})")
        return func(*args, **(kwargs or {}))


@contextmanager
def micro_batches(during: Callable[[Any], AbstractContextManager[Any]]) -> Iterator[None]:
    """Inside the block, every micro-batch of this rank runs in `during` of its rows."""

    own = micro_batch_loop.attempt

    def attempt(models: Any, device: torch.device, act: Callable[..., Any], *more: Any) -> Any:
        def inside(some: Any, last: bool) -> Any:
            with during(some):
                return act(some, last)

        return own(models, device, inside, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(micro_batch_loop, "attempt", attempt)
        yield


@contextmanager
def out_of_memory(rank: int, at: int | None = None) -> Iterator[OutOfMemoryAt]:
    """Fail at that call of all that the rank's micro-batches make inside the block, or count
    them."""
    mode = OutOfMemoryAt(at)
    own = Collective._issue

    def issue(self: Collective, output: Tensor, act: Callable[[], Any]) -> Any:
        mode.communicates = True  # what fails in there is not known to be issued or not
        work = own(self, output, act)
        mode.communicates = False
        return work

    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        if rank == dist.get_rank():
            patch.setattr(Collective, "_issue", issue)
            stack.enter_context(micro_batches(lambda rows: mode))
        yield mode


def gradients(engine: Engine) -> dict[str, Tensor]:
    return {
        name: param.grad.full_tensor().clone()
        # what a caller cannot see, but a test must
        for name, param in engine._model.hf.named_parameters()
        if param.grad is not None
    }


def apart(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference over the largest value; infinite where names differ."""
    if not wanted:  # weights are whole on rank 0 alone
        return 0.0
    if found.keys() != wanted.keys():
        return float("inf")
    scale = max(float(value.abs().max()) for value in wanted.values())
    return max(float((found[name] - value).abs().max()) for name, value in wanted.items()) / scale


def counted(act: Callable[[], Any]) -> list[int]:
    """How many calls either rank's micro-batches make."""
    counts: list[Any] = [None, None]
    with out_of_memory(dist.get_rank()) as mode:
        act()
    dist.all_gather_object(counts, mode.count)
    return counts


def sweep(
    act: Callable[[], dict[str, Tensor]], places: int, wanted: dict[str, Tensor] | None = None
) -> dict[str, Any]:
    """`act` undisturbed, and with every of `places`, spread over all calls, failing on one rank or
    the other."""
    wanted = act() if wanted is None else wanted
    counts = counted(act)
    worst = 0.0
    for number in range(places):
        rank = number % 2
        with out_of_memory(rank, 1 + counts[rank] * number // places):
            worst = max(worst, apart(act(), wanted))
    return {"calls": min(counts), "worst": worst}


def accumulated(engine: Engine) -> dict[str, Tensor]:
    """The gradients of two forward_backward."""
    for _ in range(2):
        run(engine, "forward_backward", ROWS)
    found = gradients(engine)
    engine.step(discard=True)
    return found


def positions(_: Path, path: str, places: str, *names: str) -> dict[str, Any]:
    """Gradients of forward_backward on top of pending ones, for each of the settings."""
    answer = {}
    for name in names:
        engine = build(path, **SETTINGS[name])
        answer[name] = sweep(partial(accumulated, engine), int(places))
    return answer


def operations(_: Path, path: str) -> dict[str, Any]:
    """Weights after updates that fail once each, answers of queries, refusals."""
    answer: dict[str, Any] = {}
    for role, operation in (("actor", "update_actor"), ("critic", "update_critic")):
        plain, short = (build(path, role, ppo_mini_batch_size=4, **CUT) for _ in range(2))
        counts = counted(lambda plain=plain, operation=operation: run(plain, operation, ROWS))
        run(short, operation, ROWS)
        retries = []
        for number in range(6):
            run(plain, operation, ROWS)
            with out_of_memory(number % 2, 1 + counts[number % 2] * number // 6):
                retries.append(run(short, operation, ROWS)["memory/retries"])
        answer[operation] = {"worst": apart(weights(short), weights(plain)), "retries": retries}
    engine = build(path, ppo_micro_batch_size_per_gpu=2)
    for operation in ("compute_log_prob", "compute_ref_log_prob"):
        answer[operation] = sweep(
            lambda operation=operation: {"": collect(engine, operation, ROWS)}, 8
        )
    with out_of_memory(1, 500):
        answer["retries"] = engine.compute(*planned(engine, "compute_log_prob", ROWS)).metrics
    answer["everything"] = sweep(partial(accumulated, build(path, **SETTINGS["everything"])), 10)
    return answer | {"refused": refused(engine, path)}


def refused(engine: Engine, path: str) -> list[Any]:
    """What either rank says when one row never fits on rank 1, in a query, on pending gradients and
    amid an update."""

    def too_long(rows: Any) -> AbstractContextManager[Any]:
        return OutOfMemoryAt(1 if 6 in rows else None)

    plain, updated = build(path, **CUT), build(path, ppo_mini_batch_size=4, **CUT)
    for one in (engine, plain):
        run(one, "forward_backward", ROWS)
    said: list[Any] = []
    with micro_batches(too_long):
        for act in (
            lambda: collect(engine, "compute_log_prob", ROWS),
            lambda: run(engine, "forward_backward", ROWS),
            lambda: run(updated, "update_actor", ROWS),
        ):
            try:
                act()
            except (DoesNotFit, MemoryError) as error:
                said.append([type(error).__name__, getattr(error, "row", None)])
    for one in (engine, plain):
        run(one, "forward_backward", ROWS)
        one.step()
    both: list[Any] = [None, None]
    dist.all_gather_object(both, [*said, apart(weights(engine), weights(plain))])
    return both


if __name__ == "__main__":
    be_a_rank({"positions": positions, "operations": operations})
