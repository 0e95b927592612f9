"""Padding, masks and positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from nexrl_client import (
    InvalidBatch,
    left_pad,
    loss_mask_after_prompts,
    position_ids,
    response_mask,
    right_pad,
    scoring_mask,
)

LEFT_AND_RIGHT = [[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]


def test_padding() -> None:
    """Rows stand at their edge, and the mask is 1 exactly where they stand."""
    rows = [[1, 2, 3], [], [4]]
    padded, mask = left_pad(rows, 9)
    assert padded.tolist() == [[1, 2, 3], [9, 9, 9], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 1]]
    assert (padded.dtype, mask.dtype) == (np.int64, np.int32)
    padded, mask = right_pad(rows, 9, width=4)
    assert padded.tolist() == [[1, 2, 3, 9], [9, 9, 9, 9], [4, 9, 9, 9]]
    assert mask.tolist() == [[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]


def test_padding_keeps_the_kind() -> None:
    """Tensors of torch give torch, floats stay floats of their dtype."""
    padded, mask = right_pad(
        [torch.tensor([1.5, 2.5], dtype=torch.float64), torch.tensor([3.0]).double()], 0.0
    )
    assert isinstance(padded, torch.Tensor) and (padded.dtype, mask.dtype) == (
        torch.float64,
        torch.int32,
    )
    assert padded.tolist() == [[1.5, 2.5], [3.0, 0.0]]
    assert right_pad([np.asarray([1, 2], np.int32)], 0)[0].dtype == np.int64
    assert left_pad([[0.5]], 0.0)[0].dtype == np.float32


@pytest.mark.parametrize("make", [np.asarray, torch.tensor])
def test_positions(make: Any) -> None:
    """The first attended token is position 0 wherever it stands; padding before it is 0 too."""
    found = position_ids(make(LEFT_AND_RIGHT))
    assert type(found) is type(make([0]))
    assert "int64" in str(found.dtype)
    assert found.tolist() == [[0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 4, 5], [0] * 6]


@pytest.mark.parametrize("make", [np.asarray, torch.tensor])
def test_masks(make: Any) -> None:
    """The responses' columns, what follows a prompt of so many tokens, and what both masks
    allow."""
    attention = make(LEFT_AND_RIGHT)
    assert response_mask(attention, 2).tolist() == [[1, 0], [1, 1], [0, 0]]
    after = loss_mask_after_prompts(attention, make([2, 4, 0]))
    assert after.tolist() == [[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1], [0] * 6]
    scored = scoring_mask(make([[1] * 6, [0, 1] * 3, [1] * 6]), attention)
    assert scored.tolist() == [[0, 0, 1, 1, 1, 0], [0, 1] * 3, [0] * 6]
    for mask in (after, scored):
        assert type(mask) is type(attention)
        assert "int32" in str(mask.dtype)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: left_pad([[1], [1, 2, 3]], 0, width=2), r"row 1 has shape \[3\]"),
        (lambda: right_pad([[[1]]], 0), r"row 0 has shape \[1, 1\]"),
        (lambda: response_mask(np.ones((1, 3)), 4), "of 3 columns"),
        (lambda: position_ids([1, 1]), r"attention_mask \[2\]"),
        (lambda: loss_mask_after_prompts([[1, 1]], [1, 1]), r"prompt_lengths has shape \[2\]"),
        (lambda: scoring_mask([[1, 1]], [[1]]), r"loss_mask \[1, 2\], attention_mask \[1, 1\]"),
    ],
)
def test_wrong_shapes(call: Any, message: str) -> None:
    """What does not fit is refused with its shape."""
    with pytest.raises(InvalidBatch, match=message):
        call()
