"""Judges a batch by its header: names, dtypes and shapes. Values are the ranks' business.

Shapes: B rows; S columns of ``input_ids``; R columns of ``responses`` (S - 1 without them).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nexrl_contract.errors import ServiceError
from nexrl_contract.operations import Operation, required_tensors, unread_tensors

_INTEGERS = frozenset({"I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64"})
_FLOATS = frozenset({"F64", "F32", "BF16", "F16"})
_MASKS = _INTEGERS | _FLOATS | {"BOOL"}
_IDS = ("input_ids", "attention_mask", "position_ids")
_DTYPES = {
    **dict.fromkeys(("input_ids", "position_ids", "responses", "teacher_topk_ids"), (_INTEGERS, "integers")),
    **dict.fromkeys(("attention_mask", "loss_mask", "scoring_attention_mask"), (_MASKS, "integers, bools or floats")),
}
_PER_ROW = frozenset({"advantages", "loss_weights"})
_PER_CANDIDATE = frozenset({"teacher_topk_ids", "teacher_topk_log_probs"})
_NAMED_IGNORED = 32
_NAME_LENGTH = 64


class Described(Protocol):
    """A tensor's dtype code and shape: an entry of a frame's header, or a RawTensor."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Judged:
    """A batch that the ranks may see: its number of rows, and what in it the operation does not read."""

    rows: int
    ignored: list[str]


def judge(
    tensors: Mapping[str, Described],
    operation: Operation,
    params: Mapping[str, Any],
    config: Mapping[str, Any],
    dropped: Iterable[str] = (),
) -> Judged:
    """Check the tensors that ``operation`` reads; ``dropped`` was in the request and has been left out already.

    ``config`` is the group's. Raises INVALID_TENSOR naming tensor, expected and actual.
    """
    for name in required_tensors(operation.name, params, config):
        if name not in tensors:
            raise ServiceError(
                "INVALID_TENSOR",
                f"{operation.name} needs the tensor {name}; the batch has {', '.join(sorted(tensors)[:20]) or 'none'}",
                tensor=name,
                expected="present",
                actual="missing",
            )
    read = {name: tensors[name] for name in operation.reads if name in tensors}
    _check_dtypes(read)
    rows, sequence = _check_ids(read)
    for name, tensor in read.items():
        if tensor.shape[:1] != (rows,):
            raise _wrong(name, "shape", f"{rows} rows, as input_ids has", tensor.shape)
    _check_widths(read, rows, sequence)
    unknown = [name for name in tensors if name not in operation.reads]
    return Judged(rows, shortened([*unknown, *unread_tensors(operation.name, params, config, tensors), *dropped]))


def shortened(names: Sequence[str]) -> list[str]:
    """The names as a record may hold them: sorted, none long, not too many."""
    known = sorted({name[:_NAME_LENGTH] for name in names})
    return (
        known if len(known) <= _NAMED_IGNORED else [*known[:_NAMED_IGNORED], f"and {len(known) - _NAMED_IGNORED} more"]
    )


def _check_dtypes(read: Mapping[str, Described]) -> None:
    for name, tensor in read.items():
        allowed, expected = _DTYPES.get(name, (_FLOATS | _INTEGERS, "numbers"))
        if tensor.dtype not in allowed:
            raise _wrong(name, "dtype", f"{expected} ({', '.join(sorted(allowed))})", tensor.dtype)


def _check_ids(read: Mapping[str, Described]) -> tuple[int, int]:
    """B and S."""
    shape = read["input_ids"].shape
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 2:
        raise _wrong("input_ids", "shape", "[B,S] with B at least 1 and S at least 2", shape)
    return shape[0], shape[1]


def _check_widths(read: Mapping[str, Described], rows: int, sequence: int) -> None:
    response = sequence - 1
    if "responses" in read:
        shape = read["responses"].shape
        if len(shape) != 2 or not 1 <= shape[1] < sequence:
            raise _wrong("responses", "shape", f"[{rows},R] with R from 1 to {sequence - 1}", shape)
        response = shape[1]
    for name, tensor in read.items():
        if name in _IDS and tensor.shape != (rows, sequence):
            raise _wrong(name, "shape", f"[{rows},{sequence}], as input_ids has", tensor.shape)
        if name in _IDS or name == "responses":
            continue
        if name == "temperature":
            if tensor.shape != (rows,):
                raise _wrong(name, "shape", f"[{rows}], one for each row", tensor.shape)
            continue
        if name in _PER_CANDIDATE:
            _check_candidates(name, tensor, read, rows, response)
            continue
        fits = len(tensor.shape) == 2 and tensor.shape[1] in (sequence, response)
        if not fits and not (name in _PER_ROW and len(tensor.shape) == 1):
            either = f"[{rows},{sequence}] or [{rows},{response}]" + (f" or [{rows}]" if name in _PER_ROW else "")
            raise _wrong(name, "shape", either, tensor.shape)


def _check_candidates(name: str, tensor: Described, read: Mapping[str, Described], rows: int, response: int) -> None:
    """[B,R,K], with one K for both of a teacher's tensors."""
    if len(tensor.shape) != 3 or tensor.shape[1] != response or tensor.shape[2] < 1:
        raise _wrong(name, "shape", f"[{rows},{response},K] with K at least 1", tensor.shape)
    for other in _PER_CANDIDATE & read.keys():
        if read[other].shape != tensor.shape:
            raise _wrong(name, "shape", f"{list(read[other].shape)}, as {other} has", tensor.shape)


def _wrong(name: str, what: str, expected: str, actual: str | tuple[int, ...]) -> ServiceError:
    text = actual if isinstance(actual, str) else str(list(actual))
    return ServiceError(
        "INVALID_TENSOR", f"{name} has {what} {text}; expected {expected}", tensor=name, expected=expected, actual=text
    )
