"""The JSON forms of a batch: its three parts by name, a flat mapping of tensors, or a reference to uploaded parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nexrl_contract.batch import METADATA_SECTION, TENSOR_SECTION, VALUE_SECTION
from nexrl_contract.errors import ServiceError

_FIELDS = frozenset({"data", "shape", "dtype", "encoding"})
BATCH_KEYS = (*TENSOR_SECTION, *VALUE_SECTION, *METADATA_SECTION, "payload", "parts")
"""What a body with a batch may hold besides the operation's arguments."""


@dataclass(frozen=True, slots=True)
class BatchDocument:
    """A batch inside the request; ``values`` names what no operation reads, ``params`` has all other keys."""

    tensors: dict[str, Any]
    values: list[str]
    metadata: dict[str, Any]
    params: dict[str, Any]


@dataclass(frozen=True, slots=True)
class PartsDocument:
    """A batch that was uploaded before as ``parts`` parts of ``payload``; ``metadata`` is beside what its frame has."""

    payload: str
    parts: int
    values: list[str]
    metadata: dict[str, Any]
    params: dict[str, Any]


def read_batch(document: dict[str, Any]) -> BatchDocument | PartsDocument:
    """Tell the forms apart; raises INVALID_ARGUMENT naming the key that does not fit."""
    rest = dict(document)
    tensors = _take(rest, TENSOR_SECTION)
    values = list(_take(rest, VALUE_SECTION) or {})
    metadata = _take(rest, METADATA_SECTION) or {}
    if "payload" in rest:
        return _parts(rest, values, metadata, tensors)
    if tensors is None:
        tensors = {name: rest.pop(name) for name in list(rest) if _is_tensor(rest[name])}
    return BatchDocument(tensors, values, metadata, rest)


def _parts(
    rest: dict[str, Any], values: list[str], metadata: dict[str, Any], tensors: dict[str, Any] | None
) -> PartsDocument:
    payload, parts = rest.pop("payload"), rest.pop("parts", None)
    if tensors:
        raise ServiceError(
            "INVALID_ARGUMENT", "send the tensors or the id of an uploaded payload, not both", key="payload"
        )
    if not isinstance(payload, str):
        raise ServiceError("INVALID_ARGUMENT", "payload must be the id of an uploaded payload", key="payload")
    if not isinstance(parts, int) or isinstance(parts, bool) or parts < 1:
        raise ServiceError("INVALID_ARGUMENT", "parts must say how many parts were uploaded, from 1", key="parts")
    return PartsDocument(payload, parts, values, metadata, rest)


def _take(rest: dict[str, Any], spellings: tuple[str, str]) -> dict[str, Any] | None:
    found = [name for name in spellings if name in rest]
    if len(found) == 2:
        raise ServiceError(
            "INVALID_ARGUMENT", f"{found[0]} and {found[1]} are two names of one thing; send one", key=found[1]
        )
    if not found:
        return None
    value = rest.pop(found[0])
    if value is not None and not isinstance(value, dict):
        raise ServiceError(
            "INVALID_ARGUMENT", f"{found[0]} must be an object, not {type(value).__name__}", key=found[0]
        )
    return value


def _is_tensor(value: Any) -> bool:
    """Whether somebody meant a tensor, well-formed or not: no argument is a list, or has one of these fields."""
    return isinstance(value, list) or (isinstance(value, dict) and not _FIELDS.isdisjoint(value))
