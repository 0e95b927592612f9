"""What an operation would do, in words and numbers, without doing it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nexrl_worker.training.batch.plan import Micro, MiniBatch, Plan


def computed_lengths(micro: Micro, lengths: Sequence[int], packed: bool) -> list[int]:
    """Tokens computed for every row of a micro-batch: its own where packed, else those of the
    longest; none: a dummy."""
    if not micro:
        return [1]
    longest = max(max(lengths[row] for row in micro), 1)
    return [lengths[row] if packed else longest for row in micro]


def explain_plan(plan: Plan, lengths: Sequence[int], packed: bool) -> dict[str, Any]:
    """Rows, micro-batches and tokens of every optimizer step and rank; `lengths` are the rows'
    attended tokens."""
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
