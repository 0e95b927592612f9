"""A trainer's batch, in any of its forms, to what travels: the tensors that the operation reads, and JSON metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from nexrl_contract.operations import Operation

from ._placeholders import resolve
from ._tensors import is_tensor
from ._trainer_batch import Batch
from .errors import ClientError, InvalidBatch

_TENSORS = ("tensors", "batch")
_VALUES = ("values", "non_tensor_batch")
_METADATA = ("metadata", "meta_info")
_FORMS = (
    "a Batch, {'tensors', 'values', 'metadata'}, {'batch', 'non_tensor_batch', 'meta_info'}, or a flat dict of tensors"
)
_NO_JSON = object()
_SETTINGS = ("temperature", "distillation_coeff", "entropy_coeff", "loss_agg_mode")
"""Metadata that changes what is computed."""


@dataclass(frozen=True, slots=True)
class Content:
    """tensors and metadata go to the service; ignored names everything of the caller's that does not."""

    tensors: dict[str, Any]
    metadata: dict[str, Any]
    ignored: tuple[str, ...]


def normalise(batch: object, operation: Operation | None) -> Content:
    """Take a batch apart; kept are the tensors that the operation reads, None keeps all. Raises InvalidBatch."""
    tensors, values, metadata = _with_row_temperatures(*_sections(batch))
    kept: dict[str, Any] = {}
    ignored: list[str] = []
    if operation is not None:
        tensors, ignored = resolve(operation.name, tensors)
    for name, value in tensors.items():
        if operation is not None and name not in operation.reads:
            ignored.append(name)
        else:
            kept[name] = _check_tensor(name, value)
    ignored += [str(name) for name in values]
    converted = {str(name): to_json(value) for name, value in metadata.items()}
    converted |= {name: _setting(name, metadata[name]) for name in _SETTINGS if name in metadata}
    ignored += [name for name, value in converted.items() if value is _NO_JSON]
    sent = {name: value for name, value in converted.items() if value is not _NO_JSON}
    return Content(kept, sent, tuple(dict.fromkeys(ignored)))


def json_object(mapping: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The mapping as plain JSON, NumPy scalars and non-finite numbers included; raises ClientError naming the key."""
    converted = {name: to_json(value) for name, value in mapping.items()}
    for name, value in converted.items():
        if value is _NO_JSON:
            raise ClientError(f"{what} {name!r} is, or holds, what JSON cannot say ({type(mapping[name]).__name__})")
    return converted


def to_json(value: object) -> Any:
    """The value with JSON's types alone (NaN as "NaN"), or a marker where it, or something inside it, is none."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else _non_finite(value)
    if isinstance(value, Mapping):
        items = {str(name): to_json(item) for name, item in value.items()}
        return _NO_JSON if any(item is _NO_JSON for item in items.values()) else items
    if isinstance(value, list | tuple):
        members = [to_json(item) for item in value]
        return _NO_JSON if any(item is _NO_JSON for item in members) else members
    return _NO_JSON


def _setting(name: str, value: Any) -> Any:
    """The setting as JSON, a tensor of one number as that; raises InvalidBatch, since without it another loss is meant."""
    converted = to_json(value.item() if is_tensor(value) and value.ndim == 0 else value)
    if converted is _NO_JSON:
        kind = "str" if name == "loss_agg_mode" else "float"
        raise InvalidBatch(f"metadata {name!r} is {type(value).__name__}; give {kind}({name})")
    return converted


def _non_finite(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _sections(batch: object) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]:
    if isinstance(batch, Batch):
        return dict(batch), batch.extras, batch.metadata
    if not isinstance(batch, Mapping):
        raise InvalidBatch(f"the batch is {type(batch).__name__}; give {_FORMS}")
    if not any(isinstance(batch.get(name), Mapping) for name in _TENSORS):
        return _flat(batch), {}, {}
    unknown = [str(name) for name in batch if name not in _TENSORS + _VALUES + _METADATA]
    if unknown:
        raise InvalidBatch(f"the batch has the unknown keys {', '.join(unknown)} beside its tensors; give {_FORMS}")
    tensors, values, metadata = (_section(batch, names) for names in (_TENSORS, _VALUES, _METADATA))
    return tensors, values, metadata


def _with_row_temperatures(
    tensors: Mapping[str, Any], values: Mapping[str, Any], metadata: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]:
    """One temperature for every row is a tensor [B], also where it was given as [B,1] or among the metadata."""
    given: Any = metadata.get("temperature")
    if isinstance(given, list | tuple) or (is_tensor(given) and given.ndim > 0):
        if "temperature" in tensors:
            raise InvalidBatch("temperature is a tensor and, for every row, in the metadata too; give one")
        metadata = {name: value for name, value in metadata.items() if name != "temperature"}
        tensors = {**tensors, "temperature": given if is_tensor(given) else np.asarray(given, np.float64)}
    own: Any = tensors.get("temperature")
    if is_tensor(own) and own.ndim == 2 and own.shape[1] == 1:
        tensors = {**tensors, "temperature": own[:, 0]}
    return tensors, values, metadata


def _section(batch: Mapping[str, Any], names: tuple[str, str]) -> Mapping[str, Any]:
    given = [name for name in names if batch.get(name) is not None]
    if len(given) > 1:
        raise InvalidBatch(f"the batch has both {given[0]!r} and {given[1]!r}, two names of one thing; give one")
    section = batch[given[0]] if given else {}
    if not isinstance(section, Mapping):
        raise InvalidBatch(f"the batch's {given[0]!r} is {type(section).__name__}; give a dict")
    return section


def _flat(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = [str(name) for name, value in batch.items() if isinstance(value, Mapping) or name in _TENSORS]
    if nested or not batch:
        found = f"has {', '.join(nested)}, but no dict of tensors beside" if nested else "is empty"
        raise InvalidBatch(f"the batch {found}; give {_FORMS}")
    return batch


def _check_tensor(name: str, value: object) -> object:
    if not is_tensor(value):
        raise InvalidBatch(
            f"tensor {name!r} is {type(value).__name__}; give a torch tensor or a NumPy array (np.asarray(rows))",
            details={"tensor": name},
        )
    if isinstance(value, np.ndarray) and value.dtype == object:
        raise InvalidBatch(
            f"tensor {name!r} is a NumPy array of objects; pad its rows to one length, and give numbers",
            details={"tensor": name},
        )
    return value
