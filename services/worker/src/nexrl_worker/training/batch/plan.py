"""The micro-batch plan: how a batch is cut into optimizer steps, rows per rank and micro-batches,
and what that means in numbers. Pure, made once, then broadcast."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from nexrl_worker.training.errors import InvalidValue

Micro = tuple[int, ...]


@dataclass(frozen=True)
class MiniBatch:
    """The rows of one optimizer step: `ranks[r][m]` are the rows of rank r's m-th micro-batch.

    Every rank has the same number of micro-batches; an empty one is a dummy that weighs nothing, so
    that no rank ever runs one more collective than another.
    """

    ranks: tuple[tuple[Micro, ...], ...]

    @classmethod
    def of(cls, ranks: Sequence[Sequence[Micro]]) -> MiniBatch:
        """Those of every rank, with dummies behind where a rank has fewer than another."""
        most = max(len(rank) for rank in ranks)
        return cls(tuple((*rank, *[()] * (most - len(rank))) for rank in ranks))

    def halved(self) -> MiniBatch | None:
        """With every micro-batch of several rows in two, None where there is none."""
        if all(len(micro) < 2 for rank in self.ranks for micro in rank):
            return None
        return MiniBatch.of([halves(rank) for rank in self.ranks])

    def rows(self) -> list[int]:
        """All rows of this optimizer step, over all ranks."""
        return [row for rank in self.ranks for micro in rank for row in micro]


@dataclass(frozen=True)
class Plan:
    """One operation's cut over `world_size` ranks; `mini_batches` lists every epoch's, in order."""

    size: int
    world_size: int
    mini_batches: tuple[MiniBatch, ...]

    def rows_of(self, rank: int) -> list[int]:
        """The distinct rows that `rank` reads, ascending."""
        minis = self.mini_batches
        return sorted({row for mini in minis for micro in mini.ranks[rank] for row in micro})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, for the broadcast."""
        minis = [[[*map(list, rank)] for rank in mini.ranks] for mini in self.mini_batches]
        return {"size": self.size, "world_size": self.world_size, "mini_batches": minis}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """The plan that `to_dict` wrote; raises InvalidValue as `verify` does."""
        ranks = [tuple(tuple(map(tuple, rank)) for rank in mini) for mini in data["mini_batches"]]
        plan = cls(data["size"], data["world_size"], tuple(map(MiniBatch, ranks)))
        plan.verify()
        return plan

    def verify(self) -> None:
        """Raise InvalidValue unless ranks have equally many micro-batches and rows are in range."""
        for mini in self.mini_batches:
            if len(mini.ranks) != self.world_size or len({len(rank) for rank in mini.ranks}) != 1:
                raise InvalidValue("the plan gives ranks different numbers of micro-batches")
            rows = mini.rows()
            if len(set(rows)) != len(rows) or not all(0 <= row < self.size for row in rows):
                message = (
                    "the plan names a row twice in one optimizer step, or one outside the batch"
                )
                raise InvalidValue(message)


@dataclass(frozen=True)
class PlanSettings:
    """The settings of a cut. `None` means: whole batch (mini), all rows of the rank (micro), no
    budget (tokens).

    A token budget goes before `micro_rows`. `packed`: a micro-batch costs its tokens; else as many
    as its longest row has, times its rows. `fits`: whether there is memory for one micro-batch of
    rows of these lengths; one that does not fit is cut smaller.
    """

    mini_rows: int | None = None
    epochs: int = 1
    micro_rows: int | None = None
    token_budget: int | None = None
    shuffle_seed: str | None = None
    packed: bool = False
    fits: Callable[[Sequence[int]], bool] | None = None


def make_plan(
    size: int, world_size: int, cut: PlanSettings, lengths: Sequence[int] | None = None
) -> Plan:
    """Cut `size` rows; a token budget balances ranks and micro-batches by `lengths` of rows."""
    if size < 1:
        raise InvalidValue("the batch has no rows", expected="at least 1 row", actual="0 rows")
    if cut.token_budget is not None and (lengths is None or len(lengths) != size):
        message = "token-budget micro-batches (use_dynamic_bsz) need the length of every row"
        raise InvalidValue(message)
    minis: list[MiniBatch] = []
    for epoch in range(cut.epochs):
        order = list(range(size))
        if cut.shuffle_seed is not None:
            random.Random(f"{cut.shuffle_seed}:{epoch}").shuffle(order)
        step = cut.mini_rows or size
        parts = (order[at : at + step] for at in range(0, size, step))
        minis += [_mini_batch(part, world_size, cut, lengths) for part in parts]
    return Plan(size, world_size, tuple(minis))


def _mini_batch(
    rows: list[int], world_size: int, cut: PlanSettings, lengths: Sequence[int] | None
) -> MiniBatch:
    if cut.token_budget is not None and lengths is not None:
        shares = _balanced(rows, world_size, lengths)
        ranks = [_by_tokens(share, cut.token_budget, lengths, cut) for share in shares]
    else:
        bounds = [len(rows) * rank // world_size for rank in range(world_size + 1)]
        shares = [rows[begin:end] for begin, end in pairwise(bounds)]
        ranks = [_by_rows(share, cut.micro_rows) for share in shares]
    if cut.fits is not None and lengths is not None:
        ranks = [
            [part for micro in rank for part in _fitting(micro, lengths, cut.fits)]
            for rank in ranks
        ]
    return MiniBatch.of(ranks)


def halves(micros: Iterable[Micro]) -> list[Micro]:
    """Every micro-batch in two, in order; one row stays, and a dummy goes."""
    cuts = [(micro[: len(micro) // 2], micro[len(micro) // 2 :]) for micro in micros]
    return [part for cut in cuts for part in cut if part]


def _by_rows(rows: list[int], micro_rows: int | None) -> list[Micro]:
    step = micro_rows or max(len(rows), 1)
    return [tuple(rows[at : at + step]) for at in range(0, len(rows), step)]


def _balanced(rows: list[int], world_size: int, lengths: Sequence[int]) -> list[list[int]]:
    """Longest row first to the rank with the fewest tokens; each share stays longest first."""
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        rank = min(range(world_size), key=lambda r: (loads[r], len(shares[r]), r))
        shares[rank].append(row)
        loads[rank] += max(lengths[row], 1)
    return shares


def _by_tokens(
    rows: list[int], budget: int, lengths: Sequence[int], cut: PlanSettings
) -> list[Micro]:
    """Consecutive rows (longest first) within the budget; a longer row stands alone."""
    micros: list[Micro] = []
    some: list[int] = []
    total = 0
    for row in rows:
        length = max(lengths[row], 1)
        size = total + length
        if not cut.packed:
            size = (len(some) + 1) * max(lengths[some[0]] if some else 0, length)
        if some and size > budget:
            micros.append(tuple(sorted(some)))
            some, total = [], 0
        some.append(row)
        total += length
    return [*micros, tuple(sorted(some))] if some else micros


def _fitting(
    micro: Micro, lengths: Sequence[int], fits: Callable[[Sequence[int]], bool]
) -> list[Micro]:
    """The rows in order, as many together as memory allows; one that does not fit stands alone."""
    parts: list[Micro] = []
    rest = micro
    while rest:
        sizes = [lengths[row] for row in rest]
        most = len(rest) if fits(sizes) else 1
        if most < len(rest):
            above = 2
            while above < len(rest) and fits(sizes[:above]):
                above *= 2
            counts = range(2, min(above, len(rest)) + 1)
            most = 1 + bisect_left(counts, True, key=lambda count: not fits(sizes[:count]))
        parts.append(rest[:most])
        rest = rest[most:]
    return parts


# -- what a plan would do, without doing it


def computed_lengths(micro: Micro, lengths: Sequence[int], packed: bool) -> list[int]:
    """Tokens computed for each row of a micro-batch: its own if packed, else the longest's."""
    if not micro:
        return [1]
    longest = max(max(lengths[row] for row in micro), 1)
    return [lengths[row] if packed else longest for row in micro]


def explain_plan(plan: Plan, lengths: Sequence[int], packed: bool) -> dict[str, Any]:
    """Rows, micro-batches and tokens of each step and rank; `lengths` are attended tokens."""
    steps = [_step(mini, lengths, packed) for mini in plan.mini_batches]
    attended = sum(step["tokens"] for step in steps)
    computed = sum(step["computed_tokens"] for step in steps)
    return {
        "rows": plan.size,
        "world_size": plan.world_size,
        "rows_per_rank": [len(plan.rows_of(rank)) for rank in range(plan.world_size)],
        "mini_batches": steps,
        "tokens": attended,
        "padding_share": 1.0 - attended / max(computed, 1),
    }


def _step(mini: MiniBatch, lengths: Sequence[int], packed: bool) -> dict[str, Any]:
    tokens = [sum(lengths[row] for micro in rank for row in micro) for rank in mini.ranks]
    computed = [
        sum(sum(computed_lengths(micro, lengths, packed)) for micro in rank if micro)
        for rank in mini.ranks
    ]
    return {
        "rows": len(mini.rows()),
        "micro_batches": len(mini.ranks[0]),
        "rows_per_rank": [sum(len(micro) for micro in rank) for rank in mini.ranks],
        "tokens_per_rank": tokens,
        "tokens": sum(tokens),
        "computed_tokens": sum(computed),
    }
