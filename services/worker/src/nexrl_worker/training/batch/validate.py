"""Value checks of a batch on one rank: local, before the vote, on the rows that the rank will read.

Values count only where a mask is 1: ids and numbers under a masked token are never looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from nexrl_contract.tensors import MASKS
from torch import Tensor

from nexrl_worker.training.batch.layout import Layout, Masks, Rows, read_masks
from nexrl_worker.training.errors import InvalidValue

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
        _Some(rows, layout, limits, list(indices[at : at + step])).check(names)


def longest(rows: Rows, layout: Layout, indices: Sequence[int]) -> tuple[int, int]:
    """Which of the rows has most attended tokens, and how many; (-1, 0) of none."""
    if not indices or not rows.has("attention_mask"):
        return next(iter(indices), -1), layout.sequence if indices else 0
    counts = (rows.tensor("attention_mask", list(indices)) != 0).sum(dim=-1)
    return indices[int(counts.argmax())], int(counts.max())


class _Some:
    """Some rows of a batch, n of them."""

    def __init__(self, rows: Rows, layout: Layout, limits: Limits, indices: list[int]) -> None:
        self._rows = rows
        self._layout = layout
        self._limits = limits
        self._indices = indices

    def check(self, names: Sequence[str]) -> None:
        for name in MASKS:
            if self._rows.has(name):
                mask = self._read(name)
                self._refuse(name, mask, (mask != 0) & (mask != 1), "0 or 1")
        masks = read_masks(self._rows, self._layout, self._indices)
        self._check_ids(masks)
        if self._rows.has("responses"):
            self._check_responses(masks)
        self._check_positions(masks)
        if self._rows.has("temperature"):
            given = self._read("temperature")
            wrong = ~(torch.isfinite(given) & (given > 0)) & masks.scored.any(dim=-1)
            self._refuse("temperature", given, wrong, "a positive finite number")
        for name in names:
            values = self._layout.align(self._read(name))
            scored = masks.scored if values.ndim == 2 else masks.scored[..., None]
            if name == "teacher_topk_ids":
                self._check_candidates(values, scored)
            else:
                wrong = ~torch.isfinite(values) & scored
                self._refuse(name, values, wrong, "a finite number under the mask")
            if name == "teacher_topk_log_probs":
                self._check_mass(name, values, masks.scored)

    def _read(self, name: str) -> Tensor:
        return self._rows.tensor(name, self._indices)

    def _check_ids(self, masks: Masks) -> None:
        ids, layout, most = self._read("input_ids"), self._layout, self._limits.vocabulary
        if ids.dtype.is_floating_point:
            message, actual = "input_ids must be integers", str(ids.dtype)
            raise InvalidValue(message, tensor="input_ids", expected="int64", actual=actual)
        needed = masks.attention.clone()
        needed[:, layout.sequence - layout.response :] |= masks.scored
        outside = ((ids < 0) | (ids >= most)) & needed
        self._refuse("input_ids", ids, outside, f"token ids from 0 to {most - 1}")

    def _check_responses(self, masks: Masks) -> None:
        """They repeat input_ids: where the two differ, one is not what was meant."""
        layout = self._layout
        given, meant = self._read("responses"), layout.align(self._read("input_ids"))
        differs = (given != meant) & (layout.align(masks.attention) | masks.scored)
        if bool(differs.any()):
            place, column = (int(number) for number in differs.nonzero()[0])
            row, inside = self._indices[place], layout.sequence - layout.response + column
            actual, expected = int(given[place, column]), int(meant[place, column])
            raise InvalidValue(
                f"responses holds {actual} in row {row}, column {column}, expected {expected}, "
                f"which stands there in input_ids (column {inside}): responses are its last "
                "columns",
                tensor="responses",
                row=row,
                column=column,
                expected=str(expected),
                actual=str(actual),
            )

    def _check_candidates(self, ids: Tensor, scored: Tensor) -> None:
        """ids [n,R,K] under scored [n,R,1]."""
        name, most = "teacher_topk_ids", self._limits.vocabulary
        expected = f"token ids from 0 to {most - 1}, the student's vocabulary"
        self._refuse(name, ids, ((ids < 0) | (ids >= most)) & scored, expected)
        ordered = ids.sort(dim=-1).values
        twice = (ordered[..., 1:] == ordered[..., :-1]) & scored
        self._refuse(name, ordered[..., 1:], twice, "no id twice at one position")

    def _check_mass(self, name: str, log_probs: Tensor, scored: Tensor) -> None:
        """Probabilities [n,R,K] add up to 1 at the most; bfloat16 and temperature leave some
        rounding."""
        mass = log_probs.double().exp().sum(dim=-1)
        expected = "log-probabilities whose probabilities add up to at most 1"
        self._refuse(name, mass, (mass > 1.01) & scored, expected)

    def _check_positions(self, masks: Masks) -> None:
        most, attended = self._limits.positions, masks.attention
        if not self._rows.has("position_ids"):
            self._check_lengths(attended.sum(dim=-1), most)
            return
        positions, name = self._read("position_ids"), "position_ids"
        if self._limits.counts:
            counted = attended.long().cumsum(dim=-1) - 1
            wanted = "positions counted from 0 in each row, as this model counts them itself"
            self._refuse(name, positions, (positions != counted) & attended, wanted)
        outside, expected = positions < 0, "positions from 0"
        if most is not None:
            outside = outside | (positions >= most)
            expected = f"positions from 0 to {most - 1}, the model's maximum"
        self._refuse(name, positions, outside & attended, expected)

    def _check_lengths(self, lengths: Tensor, most: int | None) -> None:
        """lengths [n] of the rows' attended tokens."""
        if most is None or int(lengths.max()) <= most:
            return
        place = int((lengths > most).nonzero()[0])
        row, length = self._indices[place], int(lengths[place])
        expected = f"at most {most}, as many as the model has positions"
        message = f"row {row} has {length} attended tokens, expected {expected}"
        raise InvalidValue(
            message, tensor="input_ids", row=row, expected=expected, actual=str(length)
        )

    def _refuse(self, name: str, values: Tensor, bad: Tensor, expected: str) -> None:
        """Raise InvalidValue for the first of `values` that is `bad`, bool of the same shape."""
        if not bool(bad.any()):
            return
        place = bad.nonzero()[0]
        row, actual = self._indices[int(place[0])], str(values[tuple(place)].item())
        message = f"{name} holds {actual} in row {row}, expected {expected}"
        raise InvalidValue(message, tensor=name, row=row, expected=expected, actual=actual)
