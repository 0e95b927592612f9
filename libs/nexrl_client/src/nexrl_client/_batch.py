"""Batch: trajectories made into the tensors that the service reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Self

import numpy as np
from nexrl_contract.tensors import MASKS
from numpy.typing import NDArray

from . import layout
from ._tensors import Tensor, TensorLike, append_zero_rows, is_tensor, own_kind, taken, to_numpy
from .errors import InvalidBatch


class Batch(MutableMapping[str, Tensor]):
    """Tensors of B rows by name, as a mapping that every method of a client takes.

    batch["advantages"] = advantages adds a tensor. batch.extras are lists of B values that are no
    tensors, such as reward and group_id: they stay with the trainer. batch.metadata holds for the
    whole batch, such as temperature.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorLike],
        extras: Mapping[str, Sequence[Any]] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises InvalidBatch for what is no tensor, and where numbers of rows differ."""
        self._tensors: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            self[name] = tensor
        self.extras = {name: list(values) for name, values in (extras or {}).items()}
        self.metadata = dict(metadata or {})
        for name, values in self.extras.items():
            if len(values) != self.rows:
                raise InvalidBatch(f"extras {name!r} has {len(values)} values for {self.rows} rows")

    @classmethod
    def from_trajectories(
        cls,
        trajectories: Sequence[object],
        pad_token_id: int,
        *,
        prompt_length: int = 1,
        response_length: int = 1,
    ) -> Self:
        """A batch of trajectories, which are mappings or objects.

        Each has tokens [n] and loss_mask [n], 1 where a token is scored. All or none have reward,
        a number, and logprobs: of all tokens, of those from the first scored one on, or of the
        scored ones. Every other field becomes an extra, those inside extra_fields and reward too.
        One temperature goes to the metadata, several are the tensor temperature [B].

        A row's prompt is what stands before its first scored token, at least one token. Prompts are
        left-padded to the longest, at least prompt_length; the rest is right-padded to the longest,
        at least response_length.

        Gives input_ids, attention_mask, position_ids, loss_mask, scoring_attention_mask [B, S] and
        responses [B, R]; of a reward token_level_scores [B, R], which has it on the last scored
        token; of logprobs rollout_log_probs [B, R], 0 where nothing is scored. They are torch
        tensors where torch is installed, else NumPy arrays. Raises InvalidBatch with the
        trajectory's number.
        """
        rows = _read_rows(trajectories)
        tensors = _tensors_of(rows, pad_token_id, prompt_length, response_length)
        names = dict.fromkeys(name for row in rows for name in row.extras)
        extras = {name: [row.extras.get(name) for row in rows] for name in names}
        temperature = _temperatures(rows)
        if isinstance(temperature, list):
            tensors["temperature"] = np.asarray(temperature, np.float32)
        metadata = {"temperature": temperature} if isinstance(temperature, float) else {}
        return cls({name: own_kind(array) for name, array in tensors.items()}, extras, metadata)

    @property
    def rows(self) -> int:
        """B."""
        return int(next(iter(self._tensors.values())).shape[0]) if self._tensors else 0

    def pad(self, multiple: int) -> Self:
        """A batch with rows added at the end, up to the next multiple.

        The new rows are 0 in every tensor, masks among them, and None in extras: they weigh
        nothing. A result has them too. The service itself needs no such rows. Raises InvalidBatch
        where the batch has no mask.
        """
        if multiple < 1:
            raise InvalidBatch(f"multiple is {multiple}; give 1 or more")
        count = -self.rows % multiple
        if count and not any(name in self._tensors for name in MASKS):
            raise InvalidBatch(
                "the batch has no mask, which is what makes added rows weigh nothing; add "
                "attention_mask"
            )
        tensors = {name: append_zero_rows(tensor, count) for name, tensor in self._tensors.items()}
        extras = {name: values + [None] * count for name, values in self.extras.items()}
        return type(self)(tensors, extras, self.metadata)

    def to_nextrainer_batch(self) -> dict[str, Any]:
        """The batch as {"batch", "non_tensor_batch", "meta_info"}, extras as object arrays [B]."""
        return {
            "batch": dict(self._tensors),
            "non_tensor_batch": {name: _objects(values) for name, values in self.extras.items()},
            "meta_info": dict(self.metadata),
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __setitem__(self, name: str, tensor: TensorLike) -> None:
        if isinstance(tensor, list | tuple) or is_tensor(tensor):
            tensor = taken(name, tensor)
        if not is_tensor(tensor) or tensor.ndim == 0:
            message = f"{name!r} is {type(tensor).__name__}; give a tensor of B rows"
            raise InvalidBatch(
                f"{message}; what is none goes to extras or metadata", details={"tensor": name}
            )
        others = [value for other, value in self._tensors.items() if other != name]
        if others and tensor.shape[0] != others[0].shape[0]:
            found, rows = list(tensor.shape), others[0].shape[0]
            message = f"tensor {name!r} has shape {found}; the batch has {rows} rows"
            raise InvalidBatch(message, details={"tensor": name})
        self._tensors[name] = tensor

    def __delitem__(self, name: str) -> None:
        del self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in self._tensors.items())
        return f"Batch({shapes}; extras {list(self.extras)}; metadata {self.metadata})"


def _tensors_of(
    rows: Sequence[_Row], pad_token_id: int, prompt_length: int, response_length: int
) -> dict[str, NDArray[Any]]:
    left = max(prompt_length, 1, *(row.prompt for row in rows))
    right = max(response_length, 1, *(row.tokens.size - row.prompt for row in rows))
    heads, tails = zip(*((r.tokens[: r.prompt], r.tokens[r.prompt :]) for r in rows), strict=True)
    prompts, before = layout.left_pad(heads, pad_token_id, left)
    responses, after = layout.right_pad(tails, pad_token_id, right)
    attention = np.concatenate([before, after], axis=1)
    ends = [row.scored[row.prompt :] for row in rows]
    scored = layout.right_pad(ends, 0, right)[0].astype(np.int32)
    loss_mask = np.concatenate([np.zeros_like(before), scored], axis=1)
    tensors = {
        "input_ids": np.concatenate([prompts, responses], axis=1),
        "attention_mask": attention,
        "position_ids": layout.position_ids(attention),
        "loss_mask": loss_mask,
        "scoring_attention_mask": layout.scoring_mask(loss_mask, attention),
        "responses": responses,
    }
    if rows[0].reward is not None:
        tensors["token_level_scores"] = _on_last(scored, [row.reward or 0.0 for row in rows])
    log_probs = [row.log_probs[row.prompt :] for row in rows if row.log_probs is not None]
    if log_probs:
        tensors["rollout_log_probs"] = layout.right_pad(log_probs, 0, right)[0].astype(np.float32)
    return tensors


def _on_last(scored: NDArray[Any], rewards: Sequence[float]) -> NDArray[np.float32]:
    """[B, R] with each reward at its row's last column that scored [B, R] has; of none, nowhere."""
    scores = np.zeros(scored.shape, np.float32)
    for number, reward in enumerate(rewards):
        columns = np.flatnonzero(scored[number])
        if columns.size:
            scores[number, columns[-1]] = reward
    return scores


def _objects(values: Sequence[Any]) -> NDArray[Any]:
    """One object a row; NumPy would make a matrix of lists that happen to be equally long."""
    array = np.empty(len(values), object)
    for number, value in enumerate(values):
        array[number] = value
    return array


_OWN = ("tokens", "loss_mask", "logprobs")


@dataclasses.dataclass(frozen=True, slots=True)
class _Row:
    """One trajectory of n tokens. prompt: how many stand before the first that is scored, at least
    1.

    tokens int64, scored bool and log_probs float64 are [n]; extras is everything else that it had.
    """

    tokens: NDArray[np.int64]
    scored: NDArray[np.bool_]
    log_probs: NDArray[np.float64] | None
    prompt: int
    reward: float | None
    extras: dict[str, Any]


def _read_rows(trajectories: Sequence[object]) -> list[_Row]:
    """Every trajectory; raises InvalidBatch with the number of one that cannot be read, or lacks
    what others have."""
    rows = [_read(_fields(given, number), number) for number, given in enumerate(trajectories)]
    if not rows:
        raise InvalidBatch("there are no trajectories; a batch has at least one row")
    _all_or_none("reward", [row.reward is None for row in rows])
    _all_or_none("logprobs", [row.log_probs is None for row in rows])
    return rows


def _temperatures(rows: Sequence[_Row]) -> float | list[float] | None:
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
            f"trajectory {lacking.index(True)} has no {name}, others have; give all of them one, "
            "or none"
        )


def _fields(trajectory: object, number: int) -> dict[str, Any]:
    """The trajectory's fields by name, those in its extra_fields among them."""
    if isinstance(trajectory, Mapping):
        fields = {str(name): value for name, value in trajectory.items()}
    elif dataclasses.is_dataclass(trajectory):
        names = [field.name for field in dataclasses.fields(trajectory)]
        fields = {name: getattr(trajectory, name) for name in names}
    elif hasattr(trajectory, "__dict__"):
        fields = dict(vars(trajectory))
    else:
        kind = type(trajectory).__name__
        raise InvalidBatch(
            f"trajectory {number} is {kind}; give a mapping or an object with tokens and loss_mask"
        )
    extra = fields.pop("extra_fields", None)
    return {**extra, **fields} if isinstance(extra, Mapping) else fields


def _read(fields: dict[str, Any], number: int) -> _Row:
    for name in ("tokens", "loss_mask"):
        if fields.get(name) is None:
            given = ", ".join(sorted(fields)) or "nothing"
            raise InvalidBatch(f"trajectory {number} has no {name}; it has {given}")
    tokens, mask = to_numpy(fields["tokens"]), to_numpy(fields["loss_mask"])
    if tokens.ndim != 1 or tokens.size == 0 or tokens.dtype.kind not in "iu":
        raise InvalidBatch(
            f"tokens of trajectory {number} have shape {list(tokens.shape)}; give integers, at "
            "least one"
        )
    if mask.shape != tokens.shape:
        raise InvalidBatch(
            f"loss_mask of trajectory {number} has shape {list(mask.shape)}, its tokens "
            f"{list(tokens.shape)}; give each token a 0 or 1"
        )
    first = int(np.argmax(mask != 0)) if mask.any() else tokens.size
    log_probs = fields.get("logprobs")
    prompt = max(first, 1)  # nothing stands before the first token that could predict it
    scored = (mask != 0) & (np.arange(tokens.size) >= prompt)
    reward = fields.get("reward")
    return _Row(
        tokens=tokens.astype(np.int64),
        scored=scored,
        log_probs=None if log_probs is None else _by_token(log_probs, mask != 0, first, number),
        prompt=prompt,
        reward=None if reward is None else float(reward),
        extras={name: value for name, value in fields.items() if name not in _OWN},
    )


def _by_token(
    log_probs: TensorLike, scored: NDArray[np.bool_], first: int, number: int
) -> NDArray[np.float64]:
    """Log-probabilities [n] of those of all n tokens, of those from the first scored one on, or of
    the scored ones."""
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
            f"logprobs of trajectory {number} have shape {list(values.shape)}; give one for each "
            f"of its {scored.size} tokens, of the {scored.size - first} from the first scored one "
            f"on, or of the {count} scored ones"
        )
    return np.where(scored, placed, 0.0)
