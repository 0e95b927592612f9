"""Trajectories as trainers keep them, read into plain arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._arrays import to_numpy
from .errors import InvalidBatch

_OWN = ("tokens", "loss_mask", "logprobs")


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One trajectory of n tokens. prompt: how many stand before the first that is scored, at least 1.

    tokens int64, scored bool and log_probs float64 are [n]; extras is everything else that it had.
    """

    tokens: NDArray[np.int64]
    scored: NDArray[np.bool_]
    log_probs: NDArray[np.float64] | None
    prompt: int
    reward: float | None
    extras: dict[str, Any]


def read_rows(trajectories: Sequence[object]) -> list[Row]:
    """Every trajectory; raises InvalidBatch with the number of one that cannot be read, or lacks what others have."""
    rows = [_read(_fields(trajectory, number), number) for number, trajectory in enumerate(trajectories)]
    if not rows:
        raise InvalidBatch("there are no trajectories; a batch has at least one row")
    _all_or_none("reward", [row.reward is None for row in rows])
    _all_or_none("logprobs", [row.log_probs is None for row in rows])
    return rows


def temperatures(rows: Sequence[Row]) -> float | list[float] | None:
    """What the rows were sampled at: one number, or one for each row; None where none says.

    Raises InvalidBatch for a row that says none beside others that differ.
    """
    given = [row.extras.get("temperature") for row in rows]
    found = {float(value) for value in given if value is not None}
    if len(found) < 2:
        return next(iter(found), None)
    _all_or_none("temperature", [value is None for value in given])
    return [float(value) for value in given if value is not None]


def _all_or_none(name: str, lacking: Sequence[bool]) -> None:
    if any(lacking) and not all(lacking):
        raise InvalidBatch(
            f"trajectory {lacking.index(True)} has no {name}, others have; give all of them one, or none"
        )


def _fields(trajectory: object, number: int) -> dict[str, Any]:
    """The trajectory's fields by name, those in its extra_fields among them."""
    if isinstance(trajectory, Mapping):
        fields = {str(name): value for name, value in trajectory.items()}
    elif dataclasses.is_dataclass(trajectory):
        fields = {field.name: getattr(trajectory, field.name) for field in dataclasses.fields(trajectory)}
    elif hasattr(trajectory, "__dict__"):
        fields = dict(vars(trajectory))
    else:
        kind = type(trajectory).__name__
        raise InvalidBatch(f"trajectory {number} is {kind}; give a mapping or an object with tokens and loss_mask")
    extra = fields.pop("extra_fields", None)
    return {**extra, **fields} if isinstance(extra, Mapping) else fields


def _read(fields: dict[str, Any], number: int) -> Row:
    for name in ("tokens", "loss_mask"):
        if fields.get(name) is None:
            raise InvalidBatch(f"trajectory {number} has no {name}; it has {', '.join(sorted(fields)) or 'nothing'}")
    tokens, mask = to_numpy(fields["tokens"]), to_numpy(fields["loss_mask"])
    if tokens.ndim != 1 or tokens.size == 0 or tokens.dtype.kind not in "iu":
        raise InvalidBatch(
            f"tokens of trajectory {number} have shape {list(tokens.shape)}; give integers, at least one"
        )
    if mask.shape != tokens.shape:
        raise InvalidBatch(
            f"loss_mask of trajectory {number} has shape {list(mask.shape)}, its tokens {list(tokens.shape)}; "
            "give each token a 0 or 1"
        )
    first = int(np.argmax(mask != 0)) if mask.any() else tokens.size
    log_probs = fields.get("logprobs")
    prompt = max(first, 1)  # nothing stands before the first token that could predict it
    scored = (mask != 0) & (np.arange(tokens.size) >= prompt)
    reward = fields.get("reward")
    return Row(
        tokens=tokens.astype(np.int64),
        scored=scored,
        log_probs=None if log_probs is None else _by_token(log_probs, mask != 0, first, number),
        prompt=prompt,
        reward=None if reward is None else float(reward),
        extras={name: value for name, value in fields.items() if name not in _OWN},
    )


def _by_token(log_probs: Any, scored: NDArray[np.bool_], first: int, number: int) -> NDArray[np.float64]:
    """Log-probabilities [n] of those of all n tokens, of those from the first scored one on, or of the scored ones."""
    values = to_numpy(log_probs).astype(np.float64)  # None becomes NaN
    placed = np.zeros(scored.size)
    count = int(scored.sum())
    if values.shape == (scored.size,):
        placed[:] = values
    elif values.shape == (scored.size - first,):
        placed[first:] = values
    elif values.shape == (count,):
        placed[scored] = values
    else:
        raise InvalidBatch(
            f"logprobs of trajectory {number} have shape {list(values.shape)}; give one for each of its {scored.size} "
            f"tokens, of the {scored.size - first} from the first scored one on, or of the {count} scored ones"
        )
    return np.where(scored, placed, 0.0)
