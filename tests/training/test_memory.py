"""Batches that are too large for memory: cut by what is there, refused, or begun again with less;
the result is the same."""

from __future__ import annotations

import os
import platform
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nexrl_host.processes import how_it_ended, oom_kills, wait_status
from nexrl_worker.training import Engine
from nexrl_worker.training.batch.plan import PlanSettings, make_plan
from nexrl_worker.training.errors import DoesNotFit, InvalidValue
from nexrl_worker.training.observe.costs import free_mib
from torch import Tensor

from tests.helpers.engines import batch, planned, save_model
from tests.helpers.rank_processes import run_ranks
from tests.helpers.single_rank import CPU, build, compute, update

TOO_MUCH = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you "
        "tried to allocate"
    ),
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("memory"))


def weights(engine: Engine) -> dict[str, Tensor]:
    return {
        name: tensor.clone() for name, tensor in engine.state.full_weights() if tensor is not None
    }


def assert_alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], rtol=0, atol=1e-9), name


def tighten(engine: Engine, rows: int) -> None:
    """Leave room for so many of the batch's longest rows."""
    longest = max(batch().lengths())
    engine.room = replace(
        engine.room, mib=engine.room.need_mib([longest] * rows, trains=True) * 1.001
    )


@contextmanager
def short_of_memory(
    engine: Engine, error: Exception, fits: int, backward: bool
) -> Iterator[list[int]]:
    """A layer that runs out of memory with more than `fits` rows, in its forward or in its
    backward."""
    met: list[int] = []

    def fail(rows: int) -> None:
        met.append(rows)
        if rows > fits:
            raise error

    def forward(_: Any, __: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if not backward:
            fail(len(hidden))
        elif hidden.requires_grad:
            hidden.register_hook(lambda grad: fail(len(grad)))

    layer: Any = engine._model.hf.model.layers[0]  # type: ignore[union-attr]
    hook = layer.register_forward_hook(forward)
    try:
        yield met
    finally:
        hook.remove()


def test_rows_are_cut_in_their_order_by_what_fits() -> None:
    lengths = [5, 1, 9, 2, 2, 7, 30, 1, 1, 1, 4]
    rooms: tuple[int, ...] = (1, 10, 18, 40, 1000)
    for room in rooms:
        for micro_rows in (None, 4):

            def fits(some: Sequence[int], room: int = room) -> bool:
                return len(some) * max(some) <= room

            plan = make_plan(11, 1, PlanSettings(micro_rows=micro_rows, fits=fits), lengths)
            micros = plan.mini_batches[0].ranks[0]
            assert [row for micro in micros for row in micro] == list(range(11))
            for micro, after in zip(micros, (*micros[1:], ()), strict=True):
                sizes = [lengths[row] for row in micro]
                assert fits(sizes) or len(micro) == 1
                whole = micro_rows is not None and (micro[-1] + 1) % micro_rows == 0
                assert not after or whole or not fits([*sizes, lengths[after[0]]]), (room, micros)
            assert room < 1000 or len(micros) == (1 if micro_rows is None else 3)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_is_cut_by_the_memory_that_is_there(packing: bool, path: str) -> None:
    """Steps, scores and top k are those of one forward, to rounding; a small batch is not cut at
    all."""
    whole, cut = build(path, packing=packing), build(path, packing=packing)
    prepared, plan = planned(whole, "update_actor", batch())
    assert len(plan.mini_batches[0].ranks[0]) == 1
    assert not whole.needs_lengths(prepared)
    tighten(cut, 2)
    assert cut.needs_lengths(prepared)
    plans = [
        planned(cut, operation, batch())[1] for operation in ("update_actor", "compute_log_prob")
    ]
    assert len(plans[0].mini_batches[0].ranks[0]) >= 3
    assert plans[0].mini_batches == plans[1].mini_batches, "an update starts at ratio 1"
    for params in ({}, {"top_k": 3}):
        ours, theirs = (
            compute(engine, "compute_log_prob", batch(), **params) for engine in (cut, whole)
        )
        for name, tensor in ours.items():
            assert torch.allclose(tensor.double(), theirs[name].double(), atol=1e-6)
    for _ in range(2):
        update(whole, batch()), update(cut, batch())
    assert_alike(weights(whole), weights(cut))


@pytest.mark.slow
def test_ranks_agree_on_the_room(path: str, tmp_path: Path) -> None:
    """The same number on both, and the same weights however little it is."""
    answer = run_ranks(2, "memory", tmp_path, path)
    assert answer["rooms"][0] == answer["rooms"][1] > 1
    assert answer["micros"] == [1, 4]
    assert answer["difference"] < 1e-9


@pytest.mark.usefixtures("one_rank")
def test_a_row_that_fits_no_cut_is_refused_with_the_numbers(path: str) -> None:
    engine = build(path)
    per_byte = replace(engine.room.activations, linear=engine.room.activations.linear * 1e9)
    engine.room = replace(engine.room, activations=per_byte)
    before = engine.state.fingerprint()
    with pytest.raises(
        InvalidValue,
        match=(
            r"row \d+ has \d+ attended tokens, which take about \d+ MiB, .* \d+ MiB, what is free"
        ),
    ):
        update(engine, batch())
    assert engine.state.fingerprint() == before
    assert compute(engine, "compute_log_prob", batch())


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("error", TOO_MUCH, ids=["device", "host"])
@pytest.mark.parametrize("backward", [False, True])
def test_memory_that_runs_out_is_asked_for_less(
    backward: bool, error: Exception, path: str
) -> None:
    """Forward or backward: with half the rows at a time, and the same weights as where there was
    enough."""
    plain, short = build(path), build(path)
    for engine in (plain, short):
        engine.accumulate(
            *planned(engine, "forward_backward", batch())
        )  # pending sums survive what comes
    update_of = [build(path), build(path)]
    update(update_of[0], batch())
    with short_of_memory(update_of[1], error, 2, backward) as met:
        (result,) = update(update_of[1], batch())
    assert result.metrics["memory/retries"] == 2
    assert max(met) == 7 and min(met) <= 2
    assert_alike(weights(update_of[0]), weights(update_of[1]))
    with short_of_memory(short, error, 2, backward):
        short.accumulate(*planned(short, "forward_backward", batch()))
    plain.accumulate(*planned(plain, "forward_backward", batch()))
    steps = [engine.step() for engine in (plain, short)]
    assert steps[0]["actor/grad_norm"] == pytest.approx(steps[1]["actor/grad_norm"], rel=1e-9)
    assert_alike(weights(plain), weights(short))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["kept back", "reduced at once", "recompute", "packed", "frozen reference"]
)
def test_one_rank_of_two_may_run_out_at_every_place(name: str, path: str, tmp_path: Path) -> None:
    """Forward, backward and recomputation, the head, FSDP's own work, with and without gradients
    kept back."""
    answer = run_ranks(2, "positions", tmp_path, path, "40", name, program="short_of_memory")[name]
    assert answer["calls"] > 1000 and answer["worst"] < 1e-9


@pytest.mark.slow
def test_one_rank_of_two_may_run_out(path: str, tmp_path: Path) -> None:
    """The other goes with it: gradients on top of pending ones, weights and scores are those of
    enough memory.

    A row that fits nowhere is named on all ranks, and leaves them as they were.
    """
    answer = run_ranks(2, "operations", tmp_path, path, program="short_of_memory")
    assert answer["everything"]["calls"] > 1000 and answer["everything"]["worst"] < 1e-9
    for operation in ("update_actor", "update_critic"):
        assert answer[operation]["worst"] < 1e-9
        assert all(sum(retries) == 1 for retries in answer[operation]["retries"])
    for operation in ("compute_log_prob", "compute_ref_log_prob"):
        assert answer[operation]["calls"] > 100 and answer[operation]["worst"] < 1e-6
    assert answer["retries"] == {"memory/retries": 1}
    said = [
        ["DoesNotFit", 6],
        ["DoesNotFit", 6],
        ["MemoryError", None],
    ]  # the last one after a step was taken
    assert [one[:3] for one in answer["refused"]] == [said, said]
    assert answer["refused"][0][3] < 1e-9


@pytest.mark.usefixtures("one_rank")
def test_scores_ask_for_less_too(path: str) -> None:
    engine = build(path)
    wanted = compute(engine, "compute_log_prob", batch(), top_k=3)
    with short_of_memory(engine, TOO_MUCH[0], 2, backward=False):
        found = compute(engine, "compute_log_prob", batch(), top_k=3)
    for name, tensor in wanted.items():
        assert torch.allclose(tensor.double(), found[name].double(), atol=1e-6)


@pytest.mark.usefixtures("one_rank")
def test_a_single_row_that_runs_out_fails_and_leaves_the_group_as_it_was(path: str) -> None:
    """Weights and pending gradients; and the next batch runs."""
    engine, plain = build(path), build(path)
    for one in (engine, plain):
        one.accumulate(*planned(one, "forward_backward", batch()))
    with (
        short_of_memory(engine, TOO_MUCH[1], 0, backward=True),
        pytest.raises(DoesNotFit, match="under a single row"),
    ):
        engine.accumulate(*planned(engine, "forward_backward", batch()))
    assert engine.state.pending
    engine.step(), plain.step()
    update(engine, batch()), update(plain, batch())
    assert_alike(weights(engine), weights(plain))


def test_what_is_free_is_within_the_host() -> None:
    available = next(
        line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line
    )
    free = free_mib(CPU, 1)
    assert 0 < free <= float(available.split()[1]) / 1024 * 1.1
    assert free_mib(CPU, 4) == pytest.approx(free / 4, rel=0.1)


@pytest.mark.parametrize(
    ("end", "kills", "said"),
    [
        ("os.kill(os.getpid(), 9)", 0, "was killed by SIGKILL"),
        ("os.kill(os.getpid(), 9)", 2, "out of memory (the kernel has killed 2"),
        ("os.kill(os.getpid(), 11)", 2, "crashed with SIGSEGV"),
        ("os._exit(3)", 0, "ended with exit code 3"),
    ],
)
def test_a_death_is_told_by_its_signal(end: str, kills: int, said: str) -> None:
    """As the launcher's parent sees it, before the launcher has waited for it and afterwards."""
    child = subprocess.Popen([sys.executable, "-c", f"import os; {end}"])
    descriptor = os.pidfd_open(child.pid)
    try:
        select.select([descriptor], [], [], 20)
        assert said in how_it_ended(wait_status(descriptor), kills)
        child.wait()
        assert said in how_it_ended(wait_status(descriptor), kills) or platform.release() < "6.15"
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("said", "kills"),
    [
        (
            {
                "sys/fs/cgroup/a/b/memory.events": "oom 3\noom_kill 2\n",
                "sys/fs/cgroup/a/memory.events": "oom_kill 5\n",
            },
            2,
        ),
        ({"sys/fs/cgroup/a/memory.events": "oom_kill 5\n"}, 5),  # the own one does not count memory
        (
            {
                "sys/fs/cgroup/memory/c/memory.oom_control": (
                    "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n"
                )
            },
            4,
        ),
        (
            {"sys/fs/cgroup/memory/memory.oom_control": "oom_kill 0\n"},
            0,
        ),  # a container, which sees the host's path
        ({}, 9),
    ],
)
def test_only_kills_in_the_own_control_group_are_told(
    said: dict[str, str], kills: int, tmp_path: Path
) -> None:
    """Those of other people on the same host are no reason for a death here; only where nothing
    else counts, they may be."""
    files = {
        "proc/self/cgroup": "4:memory:/c\n2:cpu:/\n0::/a/b\n",
        "proc/vmstat": "nr_free 1\noom_kill 9\n",
        **said,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert oom_kills(tmp_path) == kills


def test_memory_that_a_process_may_not_take_is_named_as_such() -> None:
    """A real allocation beyond a limit on addresses: what is free counts the limit, and the error
    is known."""
    limited = """
import resource, torch
from nexrl_worker.training.observe.costs import free_mib, is_out_of_memory
size = int(next(l for l in open('/proc/self/status') if l.startswith('VmSize')).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + 300 * 2**20,) * 2)
assert free_mib(torch.device('cpu'), 1) <= 300, free_mib(torch.device('cpu'), 1)
try:
    torch.empty(400 * 2**20, dtype=torch.uint8)
except BaseException as error:
    print(is_out_of_memory(error))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    program = [sys.executable, "-c", limited]
    found = subprocess.run(program, capture_output=True, text=True, timeout=120, env=environment)
    assert found.stdout.strip() == "True", found.stderr
