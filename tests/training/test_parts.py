"""The pure parts: losses, aggregation, plan, schedule, chunked head, alignment, fingerprint."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace as Space
from typing import Any

import pytest
import torch
from nexrl_contract.errors import ServiceError
from nexrl_worker.training import InvalidValue, Plan, fingerprint_of
from nexrl_worker.training.batch.layout import Layout
from nexrl_worker.training.batch.micro_batch import BatchReader
from nexrl_worker.training.batch.plan import PlanSettings, make_plan
from nexrl_worker.training.model.fingerprint import partial_fingerprint, weight_table
from nexrl_worker.training.model.lm_head import HeadCall, active_chunks, head_log_probs
from nexrl_worker.training.optim import Schedule
from torch import Tensor

from tests.helpers.engines import MemoryRows, batch

CPU = torch.device("cpu")


# -- plan
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "cut",
    [
        PlanSettings(),
        PlanSettings(mini_rows=4, micro_rows=3, epochs=2),
        PlanSettings(mini_rows=5, token_budget=20, shuffle_seed="1"),
    ],
)
def test_every_row_once_and_equal_collectives(world_size: int, cut: PlanSettings) -> None:
    """Each epoch holds each row once; all ranks have as many micro-batches; JSON brings the same
    plan back."""
    lengths = [3, 9, 30, 1, 0, 7, 8, 12, 5, 2, 6]
    plan = make_plan(11, world_size, cut, lengths)
    assert Plan.from_dict(plan.to_dict()) == plan
    assert sorted(row for mini in plan.mini_batches for row in mini.rows()) == sorted(
        list(range(11)) * cut.epochs
    )
    assert plan == make_plan(11, world_size, cut, lengths)
    if cut.token_budget:
        micros = [m for mini in plan.mini_batches for rank in mini.ranks for m in rank if m]
        assert all(
            len(m) == 1 or len(m) * max(lengths[row] for row in m) <= cut.token_budget
            for m in micros
        )


def test_plan_balances_and_refuses() -> None:
    """Token-budget cuts balance ranks by length; a plan with unequal ranks or a missing length is
    refused."""
    plan = make_plan(8, 2, PlanSettings(token_budget=100), [50, 1, 1, 1, 1, 20, 20, 10])
    loads = [
        sum([50, 1, 1, 1, 1, 20, 20, 10][row] for m in rank for row in m)
        for rank in plan.mini_batches[0].ranks
    ]
    assert abs(loads[0] - loads[1]) <= 2
    assert plan == make_plan(
        8, 2, PlanSettings(token_budget=100, micro_rows=1), [50, 1, 1, 1, 1, 20, 20, 10]
    )
    broken = plan.to_dict()
    broken["mini_batches"][0][0].append([])
    for call in (
        lambda: Plan.from_dict(broken),
        lambda: make_plan(8, 2, PlanSettings(token_budget=9)),
    ):
        with pytest.raises(InvalidValue):
            call()


def test_shuffle_changes_with_epoch_and_seed() -> None:
    """A seeded shuffle is another order in each epoch and for another seed."""
    one = make_plan(20, 1, PlanSettings(epochs=2, shuffle_seed="0:0"))
    two = make_plan(20, 1, PlanSettings(epochs=2, shuffle_seed="0:1"))
    orders = [mini.rows() for plan in (one, two) for mini in plan.mini_batches]
    assert len({tuple(order) for order in orders}) == 4


# -- schedule
# --------------------------------------------------------------------------------------------------


def rates(**changes: Any) -> list[float]:
    optim = Space(
        **{
            **dict(
                lr=2.0,
                lr_warmup_steps=0,
                lr_scheduler="constant",
                total_training_steps=None,
                min_lr_ratio=0.0,
            ),
            **changes,
        }
    )
    schedule = Schedule(optim)
    return [schedule.lr(step) for step in range(9)]


def test_schedules_by_formula() -> None:
    """Warm-up starts at lr/n; decays reach min_lr_ratio at total_training_steps and stay there."""
    assert rates() == [2.0] * 9
    assert rates(lr_warmup_steps=4)[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    linear = rates(
        lr_warmup_steps=2, lr_scheduler="linear", total_training_steps=6, min_lr_ratio=0.5
    )
    assert linear == pytest.approx([1.0, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0, 1.0, 1.0])
    cosine = rates(lr_scheduler="cosine", total_training_steps=8, min_lr_ratio=0.1)
    assert cosine == pytest.approx(
        [2 * (0.1 + 0.45 * (1 + math.cos(math.pi * t / 8))) for t in range(9)]
    )


# -- chunked head
# --------------------------------------------------------------------------------------------------


def head(count: int = 11, width: int = 5, vocabulary: int = 13, bias: bool = True) -> list[Any]:
    random = torch.Generator().manual_seed(0)
    made = [
        torch.randn(shape, generator=random, dtype=torch.float64)
        for shape in ((count, width), (vocabulary, width), (vocabulary,))
    ]
    return [
        *made[:2],
        made[2] if bias else None,
        torch.randint(0, vocabulary, (count,), generator=random),
    ]


@pytest.mark.parametrize("length", [1, 4, 11, 50])
def test_chunks_equal_plain_log_softmax(length: int) -> None:
    """Values, entropies and all gradients equal log_softmax of the full logits at temperature
    0.6."""
    hidden, weight, bias, labels = head()
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]
    active = active_chunks(torch.ones(11).bool(), length)
    got = head_log_probs(hidden, weight, bias, HeadCall(labels, 0.6, length, active, True))
    logs = torch.log_softmax((hidden @ weight.t() + bias) / 0.6, dim=-1)
    wanted = logs.gather(1, labels[:, None])[:, 0], -(logs.exp() * logs).sum(dim=-1)
    mix = torch.linspace(-1, 2, 11).double()
    for one, other in zip(got, wanted, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-13)
    grads = [
        torch.autograd.grad((lp * mix + entropy * mix.square()).sum(), leaves)
        for lp, entropy in (got, wanted)
    ]
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_inactive_chunks_cost_nothing_and_stay_connected() -> None:
    """A chunk without a wanted label gives 0 and no gradient, yet every leaf gets a gradient
    tensor."""
    hidden, weight, bias, labels = head()
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]
    wanted = torch.zeros(11).bool()
    wanted[5] = True
    active = active_chunks(wanted, 4)
    assert active == (False, True, False)
    log_probs, _ = head_log_probs(hidden, weight, bias, HeadCall(labels, 1.0, 4, active, False))
    assert log_probs[:4].abs().max() == 0 and log_probs[4:8].abs().min() > 0
    none = head_log_probs(hidden, weight, bias, HeadCall(labels, 1.0, 4, (False,) * 3, False))[0]
    assert all(grad.abs().max() == 0 for grad in torch.autograd.grad(none.sum(), leaves))


# -- alignment
# --------------------------------------------------------------------------------------------------


def test_alignment_and_mask_precedence() -> None:
    """Label k is column S-R+k, predicted at the last attended column before; a row's attended
    tokens come first.

    The mask is the scoring mask, else loss x attention, else attention.
    """
    ids = torch.arange(12).view(2, 6)
    attention = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    loss = torch.tensor([[1, 1, 1, 1, 0, 1], [0, 0, 0, 1, 0, 1]])
    tensors = {"input_ids": ids, "attention_mask": attention, "responses": ids[:, 3:]}

    def read(more: dict[str, Tensor]) -> Any:
        rows = MemoryRows({**tensors, **more})
        names = tuple(name for name in ("advantages",) if name in more)
        return BatchReader(rows, Layout.of(rows), names, CPU, torch.float64).read([0, 1])

    plain = read({})
    assert plain.mask.int().tolist() == [[1, 1, 0], [1, 1, 1]]
    assert plain.labels.tolist() == [3, 4, 9, 10, 11]
    assert plain.input_ids.flatten()[plain.index].tolist() == [2, 3, 8, 9, 10]
    assert plain.scatter(plain.labels.double()).tolist() == [[3, 4, 0], [9, 10, 11]]
    assert plain.input_ids.tolist() == [[1, 2, 3, 4, 0, 0], [6, 7, 8, 9, 10, 11]]
    assert plain.attention_mask.tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert [plain.position_ids[0, :4].tolist(), plain.position_ids[1].tolist()] == [
        [0, 1, 2, 3],
        [0, 1, 2, 3, 4, 5],
    ]
    assert plain.input_ids.flatten()[plain.last].tolist() == [4, 11]
    given = read({"position_ids": torch.arange(12).view(2, 6) + 20})
    assert [given.position_ids[0, :4].tolist(), given.position_ids[1].tolist()] == [
        [21, 22, 23, 24],
        [*range(26, 32)],
    ]
    holed = read({"attention_mask": torch.tensor([[0, 1, 0, 1, 0, 1], [1, 1, 1, 0, 0, 0]])})
    assert holed.labels.tolist() == [3, 5] and holed.input_ids.flatten()[holed.index].tolist() == [
        1,
        3,
    ]
    assert holed.slots.tolist() == [0, 2] and holed.mask.int().tolist() == [[1, 0, 1], [0, 0, 0]]
    assert read({"loss_mask": loss}).mask.int().tolist() == [[1, 0, 0], [1, 0, 1]]
    assert read({"loss_mask": loss, "scoring_attention_mask": attention * 0}).mask.sum() == 0
    wide, narrow, per_row = (
        torch.arange(12.0).view(2, 6),
        torch.arange(6.0).view(2, 3),
        torch.tensor([5.0, 6.0]),
    )
    assert read({"advantages": wide}).values["advantages"].tolist() == [[3, 4, 5], [9, 10, 11]]
    assert read({"advantages": narrow}).values["advantages"].tolist() == narrow.tolist()
    assert read({"advantages": per_row}).values["advantages"].tolist() == [[5] * 3, [6] * 3]


def test_padding_columns_are_not_computed() -> None:
    """Columns that are padding in every row of a micro-batch are cut away; without responses R is S
    - 1."""
    rows = batch()
    reader = BatchReader(rows, Layout.of(rows), (), CPU, torch.float64)
    alone, together = reader.read([0]), reader.read([0, 4])
    assert alone.padded < together.padded / 2 and together.padded == 2 * 14
    assert alone.input_ids.shape[1] <= alone.attended + 1
    whole = MemoryRows({"input_ids": rows.tensors["input_ids"]})
    assert Layout.of(whole).response == 13
    for bad in (torch.zeros(7, 14), torch.zeros(7)):
        with pytest.raises(ServiceError, match="responses"):
            Layout.of(MemoryRows({**rows.tensors, "responses": bad}))


# -- fingerprint
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fingerprint_of_pieces(dtype: torch.dtype) -> None:
    """Any cut of a tensor sums to the whole's fingerprint; exchanging two elements or names changes
    it."""
    tensor = torch.randn(200_003, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = fingerprint_of([("a", tensor)])
    table = weight_table(CPU)
    cuts = [0, 1, 65_535, 65_536, 131_080, 200_003]
    parts = [
        int(partial_fingerprint("a", tensor[i:j], i, table)) for i, j in itertools.pairwise(cuts)
    ]
    assert sum(parts) % (1 << 64) == whole and 0 <= whole < 1 << 64
    swapped = tensor.clone()
    swapped[[3, 70_000]] = tensor[[70_000, 3]]
    assert len({whole, fingerprint_of([("a", swapped)]), fingerprint_of([("b", tensor)])}) == 3
