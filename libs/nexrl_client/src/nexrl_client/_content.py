"""A trainer's batch, in any of its forms, to what travels: the tensors that the operation reads,
and JSON metadata."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from nexrl_contract.batch import METADATA_SECTION, TENSOR_SECTION, VALUE_SECTION
from nexrl_contract.operations import SETTINGS, Operation

from ._batch import Batch
from ._tensors import is_tensor, taken
from .errors import ClientError, InvalidBatch

_FORMS = (
    "a Batch, {'tensors', 'values', 'metadata'}, {'batch', 'non_tensor_batch', 'meta_info'}, or a "
    "flat dict of tensors"
)
_DEPTH = 60
_OLD, _STUDENT = "old_log_probs", "old_student_log_probs"


@dataclass(frozen=True, slots=True)
class Content:
    """tensors and metadata go to the service; ignored names everything of the caller's that does
    not."""

    tensors: dict[str, Any]
    metadata: dict[str, Any]
    ignored: tuple[str, ...]


def normalise(batch: object, operation: Operation | None) -> Content:
    """Take a batch apart; kept are the tensors that the operation reads, None keeps all. Raises
    InvalidBatch."""
    tensors, values, metadata = _with_row_temperatures(*_sections(batch))
    read = None if operation is None else {*operation.reads, _STUDENT}
    kept = {n: taken(n, value) for n, value in tensors.items() if read is None or n in read}
    ignored = [name for name in tensors if name not in kept]
    if operation is not None:
        kept, dropped = _without_placeholders(operation, kept)
        ignored += dropped
    ignored += [str(name) for name in values]
    sent: dict[str, Any] = {}
    for name, value in metadata.items():
        try:
            sent[str(name)] = to_json(value, str(name))
        except NotJSON as error:
            if name in SETTINGS:  # without it another loss is meant
                kind = "str" if name == "loss_agg_mode" else "float"
                raise InvalidBatch(
                    f"metadata.{error}; give {kind}({name})",
                    details={"key": f"metadata.{error.path}"},
                ) from None
            ignored.append(error.path)
    return Content(kept, sent, tuple(dict.fromkeys(ignored)))


def _without_placeholders(
    operation: Operation, tensors: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The tensors to go on with, and the names of those left out.

    Log-probabilities that were not computed come as zeros [B, 1]; where R > 1 that is no value, and
    is left out. Distillation's old_student_log_probs is old_log_probs of the batch that has none.
    """
    kept = dict(tensors)
    dropped = [n for n in (_OLD, _STUDENT) if n in kept and _is_placeholder(kept[n], kept)]
    for name in dropped:
        del kept[name]
    if operation.learns == "distillation" and _STUDENT in kept and _OLD not in kept:
        kept[_OLD] = kept.pop(_STUDENT)
    dropped += [name for name in kept if name not in operation.reads]
    return {n: tensor for n, tensor in kept.items() if n in operation.reads}, dropped


def _is_placeholder(tensor: Any, tensors: Mapping[str, Any]) -> bool:
    """Whether a tensor is zeros [B, 1] although the batch has more than one response position."""
    if _columns(tensor) != 1 or bool((tensor != 0).any()):
        return False
    responses = tensors.get("responses")
    whole = tensors.get("input_ids")
    return (_columns(responses) if responses is not None else _columns(whole) - 1) > 1


def _columns(tensor: Any) -> int:
    return int(tensor.shape[1]) if is_tensor(tensor) and tensor.ndim == 2 else 0


def json_object(mapping: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The mapping as plain JSON, NumPy scalars and non-finite numbers included; raises ClientError
    naming the key."""
    try:
        converted: dict[str, Any] = to_json(mapping)
    except NotJSON as error:
        raise ClientError(f"{what} {error}", details={"key": error.path}) from None
    return converted


class NotJSON(ValueError):
    """A value that JSON cannot say; path is dotted, from the value that was to be converted."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path} {reason}".strip())
        self.path = path


def to_json(value: Any, path: str = "", depth: int = 0) -> Any:
    """The value with JSON's types alone: scalars of NumPy and torch as numbers, paths as text, NaN
    as "NaN".

    Mappings and sequences may be of any library (OmegaConf's resolve themselves). Raises NotJSON.
    """
    if isinstance(value, np.generic) or (is_tensor(value) and value.ndim == 0):
        value = _scalar(value, path)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else _non_finite(value)
    if depth > _DEPTH:
        raise NotJSON(path, f"holds more than {_DEPTH} values inside one another")
    if isinstance(value, Mapping):
        return {
            str(name): to_json(item, below(path, name), depth + 1)
            for name, item in _items(value, path)
        }
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [to_json(item, f"{path}[{index}]", depth + 1) for index, item in _items(value, path)]
    raise NotJSON(path, f"is {type(value).__name__}, which JSON cannot say")


def _scalar(value: Any, path: str) -> Any:
    if np.ma.is_masked(value):
        raise NotJSON(path, "is a masked value, which JSON cannot say")
    try:
        return value.item()
    except RuntimeError as error:  # a tensor without data
        raise NotJSON(path, f"has no value: {str(error).splitlines()[0]}") from None


def _items(value: Mapping[Any, Any] | Sequence[Any], path: str) -> list[tuple[Any, Any]]:
    try:
        return list(value.items() if isinstance(value, Mapping) else enumerate(value))
    except Exception as error:
        # A mapping of another library makes its values when they are asked for.
        raise NotJSON(path, f"cannot be read: {str(error).splitlines()[0]}") from error


def below(path: str, name: object) -> str:
    """The dotted path of what has this name in the value at ``path``."""
    return f"{path}.{name}" if path else str(name)


def _non_finite(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _sections(batch: object) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]:
    if isinstance(batch, Batch):
        return dict(batch), batch.extras, batch.metadata
    if _is_tensordict(batch):
        opened: dict[str, Any] = _opened(batch)
        if not any(name in TENSOR_SECTION for name in opened):
            return opened, {}, {}
        batch = opened
    if isinstance(batch, Mapping):
        batch = {
            name: _opened(value) if name in TENSOR_SECTION else value
            for name, value in batch.items()
        }
    else:
        raise InvalidBatch(f"the batch is {type(batch).__name__}; give {_FORMS}")
    if not any(isinstance(batch.get(name), Mapping) for name in TENSOR_SECTION):
        return _flat(batch), {}, {}
    unknown = [
        str(name) for name in batch if name not in TENSOR_SECTION + VALUE_SECTION + METADATA_SECTION
    ]
    if unknown:
        raise InvalidBatch(
            f"the batch has the unknown keys {', '.join(unknown)} beside its tensors; give {_FORMS}"
        )
    tensors, values, metadata = (
        _section(batch, names) for names in (TENSOR_SECTION, VALUE_SECTION, METADATA_SECTION)
    )
    return tensors, values, metadata


def _is_tensordict(value: Any) -> bool:
    return hasattr(value, "batch_size") and callable(getattr(value, "items", None))


def _opened(value: Any) -> Any:
    """A TensorDict as a dict of its entries: iterating one gives its rows."""
    return (
        {str(name): _entry(value, name) for name in value.keys()}  # noqa: SIM118
        if _is_tensordict(value)
        else value
    )


def _entry(tensordict: Any, name: Any) -> Any:
    try:
        return tensordict.get(name)
    except RuntimeError as error:  # a lazy stack of rows that cannot be stacked
        reason = "has rows of several shapes, which cannot be stacked; pad them"
        raise InvalidBatch(f"tensor {name!r} {reason}", details={"tensor": str(name)}) from error


def _with_row_temperatures(
    tensors: Mapping[str, Any], values: Mapping[str, Any], metadata: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]:
    """One temperature for every row is a tensor [B], also where it was given as [B,1] or among the
    metadata."""
    given: Any = metadata.get("temperature")
    if isinstance(given, list | tuple) or (is_tensor(given) and given.ndim > 0):
        if "temperature" in tensors:
            raise InvalidBatch(
                "temperature is a tensor and, for every row, in the metadata too; give one"
            )
        metadata = {name: value for name, value in metadata.items() if name != "temperature"}
        tensors = {**tensors, "temperature": given}
    if "temperature" in tensors:
        own: Any = taken("temperature", tensors["temperature"])
        tensors = {
            **tensors,
            "temperature": own[:, 0] if own.ndim == 2 and own.shape[1] == 1 else own,
        }
    return tensors, values, metadata


def _section(batch: Mapping[str, Any], names: tuple[str, str]) -> Mapping[str, Any]:
    given = [name for name in names if batch.get(name) is not None]
    if len(given) > 1:
        raise InvalidBatch(
            f"the batch has both {given[0]!r} and {given[1]!r}, two names of one thing; give one"
        )
    section = batch[given[0]] if given else {}
    if not isinstance(section, Mapping):
        raise InvalidBatch(f"the batch's {given[0]!r} is {type(section).__name__}; give a dict")
    return section


def _flat(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = [
        str(name)
        for name, value in batch.items()
        if isinstance(value, Mapping) or name in TENSOR_SECTION
    ]
    if nested or not batch:
        found = f"has {', '.join(nested)}, but no dict of tensors beside" if nested else "is empty"
        raise InvalidBatch(f"the batch {found}; give {_FORMS}")
    return batch
