"""Value checks of a batch on one rank: local, before the vote, on the rows that the rank will read.

Values count only where a mask is 1: ids and numbers under a masked token are never looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nexrl_worker.training.batch.layout import Layout, Masks, Rows, read_masks
from nexrl_worker.training.errors import InvalidValue

_MASKS = ("attention_mask", "loss_mask", "scoring_attention_mask")
_CHECKED_TOKENS = 1 << 17


@dataclass(frozen=True)
class Limits:
    """What the model can take: ids below `vocabulary`, positions below `positions` (None: no
    limit).

    `counts`: it counts positions itself, from 0, and takes no others.
    """

    vocabulary: int
    positions: int | None
    counts: bool = False


def check_rows(
    rows: Rows, layout: Layout, limits: Limits, names: Sequence[str], indices: Sequence[int]
) -> None:
    """Raise InvalidValue naming tensor and row for the first bad value among the rows `indices`.

    Some rows at a time, so that checking takes little memory beside the batch.
    """
    step = max(_CHECKED_TOKENS // layout.sequence, 1)
    for at in range(0, len(indices), step):
        _check_some(rows, layout, limits, names, list(indices[at : at + step]))


def longest(rows: Rows, layout: Layout, indices: Sequence[int]) -> tuple[int, int]:
    """Which of the rows has most attended tokens, and how many; (-1, 0) of none."""
    if not indices or not rows.has("attention_mask"):
        return next(iter(indices), -1), layout.sequence if indices else 0
    counts = (rows.tensor("attention_mask", list(indices)) != 0).sum(dim=-1)
    return indices[int(counts.argmax())], int(counts.max())


def _check_some(
    rows: Rows, layout: Layout, limits: Limits, names: Sequence[str], indices: list[int]
) -> None:
    for name in _MASKS:
        if rows.has(name):
            mask = rows.tensor(name, indices)
            _refuse(name, mask, (mask != 0) & (mask != 1), "0 or 1", indices)
    masks = read_masks(rows, layout, indices)
    _check_ids(rows, layout, limits, masks, indices)
    if rows.has("responses"):
        _check_responses(rows, layout, masks, indices)
    _check_positions(rows, limits, masks, indices)
    if rows.has("temperature"):
        given = rows.tensor("temperature", indices)
        wrong = ~(torch.isfinite(given) & (given > 0)) & masks.scored.any(dim=-1)
        _refuse("temperature", given, wrong, "a positive finite number", indices)
    for name in names:
        values = layout.align(rows.tensor(name, indices))
        scored = masks.scored if values.ndim == 2 else masks.scored[..., None]
        if name == "teacher_topk_ids":
            _check_candidates(values, scored, limits, indices)
        else:
            _refuse(
                name,
                values,
                ~torch.isfinite(values) & scored,
                "a finite number under the mask",
                indices,
            )
        if name == "teacher_topk_log_probs":
            _check_mass(name, values, masks.scored, indices)


def _check_ids(
    rows: Rows, layout: Layout, limits: Limits, masks: Masks, indices: list[int]
) -> None:
    ids = rows.tensor("input_ids", indices)
    if ids.dtype.is_floating_point:
        raise InvalidValue(
            "input_ids must be integers",
            tensor="input_ids",
            expected="int64",
            actual=str(ids.dtype),
        )
    needed = masks.attention.clone()
    needed[:, layout.sequence - layout.response :] |= masks.scored
    outside = ((ids < 0) | (ids >= limits.vocabulary)) & needed
    _refuse("input_ids", ids, outside, f"token ids from 0 to {limits.vocabulary - 1}", indices)


def _check_responses(rows: Rows, layout: Layout, masks: Masks, indices: list[int]) -> None:
    """They say nothing that input_ids do not: where they differ, one of the two is not what was
    meant."""
    given, meant = (
        rows.tensor("responses", indices),
        layout.align(rows.tensor("input_ids", indices)),
    )
    differs = (given != meant) & (layout.align(masks.attention) | masks.scored)
    if bool(differs.any()):
        place, column = (int(number) for number in differs.nonzero()[0])
        row, actual, expected = indices[place], int(given[place, column]), int(meant[place, column])
        raise InvalidValue(
            f"responses holds {actual} in row {row}, column {column}, expected {expected}, which "
            "stands there in "
            f"input_ids (column {layout.sequence - layout.response + column}): responses are its "
            "last columns",
            tensor="responses",
            row=row,
            column=column,
            expected=str(expected),
            actual=str(actual),
        )


def _check_candidates(ids: Tensor, scored: Tensor, limits: Limits, indices: list[int]) -> None:
    name = "teacher_topk_ids"
    outside = ((ids < 0) | (ids >= limits.vocabulary)) & scored
    _refuse(
        name,
        ids,
        outside,
        f"token ids from 0 to {limits.vocabulary - 1}, the student's vocabulary",
        indices,
    )
    ordered = ids.sort(dim=-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & scored
    _refuse(name, ordered[..., 1:], twice, "no id twice at one position", indices)


def _check_mass(name: str, log_probs: Tensor, scored: Tensor, indices: list[int]) -> None:
    """Probabilities add up to 1 at the most; bfloat16 and temperature leave some rounding."""
    mass = log_probs.double().exp().sum(dim=-1)
    _refuse(
        name,
        mass,
        (mass > 1.01) & scored,
        "log-probabilities whose probabilities add up to at most 1",
        indices,
    )


def _check_positions(rows: Rows, limits: Limits, masks: Masks, indices: list[int]) -> None:
    counted = masks.attention.long().cumsum(dim=-1) - 1
    if not rows.has("position_ids"):
        _check_lengths(masks.attention.sum(dim=-1), limits.positions, indices)
        return
    positions, name = rows.tensor("position_ids", indices), "position_ids"
    if limits.counts:
        wanted = "positions counted from 0 in each row, as this model counts them itself"
        _refuse(name, positions, (positions != counted) & masks.attention, wanted, indices)
    outside = positions < 0
    expected = "positions from 0"
    if limits.positions is not None:
        outside = outside | (positions >= limits.positions)
        expected = f"positions from 0 to {limits.positions - 1}, the model's maximum"
    _refuse(name, positions, outside & masks.attention, expected, indices)


def _check_lengths(lengths: Tensor, most: int | None, indices: list[int]) -> None:
    if most is None or int(lengths.max()) <= most:
        return
    place = int((lengths > most).nonzero()[0])
    row, length = indices[place], int(lengths[place])
    expected = f"at most {most}, as many as the model has positions"
    message = f"row {row} has {length} attended tokens, expected {expected}"
    raise InvalidValue(message, tensor="input_ids", row=row, expected=expected, actual=str(length))


def _refuse(name: str, values: Tensor, bad: Tensor, expected: str, indices: list[int]) -> None:
    if not bool(bad.any()):
        return
    place = bad.nonzero()[0]
    row = indices[int(place[0])]
    actual = str(values[tuple(place)].item())
    message = f"{name} holds {actual} in row {row}, expected {expected}"
    raise InvalidValue(message, tensor=name, row=row, expected=expected, actual=actual)
