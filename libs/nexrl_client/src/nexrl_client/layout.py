"""How sequences lie in a batch: padding, masks and positions. B rows, S positions, the last R of
them responses.

Pure functions that take torch tensors or NumPy arrays (rows may be lists) and give back the kind
that they got.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ._tensors import Tensor, TensorLike, check_shapes, restore, to_numpy
from .errors import InvalidBatch

__all__ = [
    "left_pad",
    "loss_mask_after_prompts",
    "position_ids",
    "response_mask",
    "right_pad",
    "scoring_mask",
]


def left_pad(
    rows: Sequence[TensorLike], value: float, width: int | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of several lengths at the right edge of one tensor, value before them.

    rows are B tensors, arrays or lists [n]. width None takes the longest row's length. Integers
    become int64, floats keep their dtype, of lists float32. Returns padded [B, width] and its mask
    [B, width] int32, which is 1 on the rows' own. Raises InvalidBatch for a row that is not [n] or
    is longer than width.
    """
    return _pad(rows, value, width, left=True)


def right_pad(
    rows: Sequence[TensorLike], value: float, width: int | None = None
) -> tuple[Tensor, Tensor]:
    """As left_pad, with each row at the left edge and value after it."""
    return _pad(rows, value, width, left=False)


def position_ids(attention_mask: TensorLike) -> Tensor:
    """Positions [B, S] int64 of an attention_mask [B, S].

    They are clip(cumsum - 1, 0) of each row: its first attended token has position 0.
    """
    attended = to_numpy(attention_mask) != 0
    check_shapes({"attention_mask": attended}, 2)
    return restore(np.maximum(np.cumsum(attended, axis=1, dtype=np.int64) - 1, 0), attention_mask)


def response_mask(mask: Tensor, responses: int) -> Tensor:
    """The last columns of a mask [B, S]: [B, R] with R = responses. Raises InvalidBatch where R is
    not 1 to S."""
    columns = int(mask.shape[1])
    if not 0 < responses <= columns:
        raise InvalidBatch(
            f"responses is {responses}; of {columns} columns it can be 1 to {columns}"
        )
    return mask[:, columns - responses :]


def loss_mask_after_prompts(attention_mask: TensorLike, prompt_lengths: TensorLike) -> Tensor:
    """A loss_mask [B, S] int32 of an attention_mask [B, S] and prompt_lengths [B].

    It is 1 on every attended token after a row's first prompt_lengths attended ones. This is for
    conversations of one turn; where a tool or a user speaks in between, the trainer knows the mask.
    """
    attended, lengths = to_numpy(attention_mask) != 0, to_numpy(prompt_lengths)
    check_shapes({"attention_mask": attended}, 2)
    if lengths.shape != attended.shape[:1]:
        raise InvalidBatch(
            f"prompt_lengths has shape {list(lengths.shape)}; it must be [{len(attended)}]"
        )
    seen = np.cumsum(attended, axis=1)
    return restore((attended & (seen > lengths[:, None])).astype(np.int32), attention_mask)


def scoring_mask(loss_mask: TensorLike, attention_mask: TensorLike) -> Tensor:
    """The scoring_attention_mask [B, S] int32 of a loss_mask [B, S] and an attention_mask [B, S].

    It is 1 where both are not 0.
    """
    loss, attended = to_numpy(loss_mask) != 0, to_numpy(attention_mask) != 0
    check_shapes({"loss_mask": loss, "attention_mask": attended}, 2)
    return restore((loss & attended).astype(np.int32), loss_mask, attention_mask)


def _pad(
    rows: Sequence[TensorLike], value: float, width: int | None, *, left: bool
) -> tuple[Tensor, Tensor]:
    arrays = [to_numpy(row) for row in rows]
    longest = max((array.size for array in arrays), default=0)
    room = longest if width is None else width
    for number, array in enumerate(arrays):
        if array.ndim != 1 or array.size > room:
            raise InvalidBatch(
                f"row {number} has shape {list(array.shape)}; it must be at most [{room}]"
            )
    # An empty list is of floats to NumPy; it must not decide for the others.
    kinds = {array.dtype.kind for array in arrays if array.size}
    padded = np.full((len(arrays), room), value, np.float64 if "f" in kinds else np.int64)
    mask = np.zeros(padded.shape, np.int32)
    for number, array in enumerate(arrays):
        place = slice(room - array.size, room) if left else slice(0, array.size)
        padded[number, place] = array
        mask[number, place] = 1
    return restore(padded, *rows), restore(mask, *rows)
