"""What trainers in the field send under another name, or in place of what they did not compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._tensors import is_tensor

_OLD = "old_log_probs"
_STUDENT = "old_student_log_probs"
RENAMED = (_STUDENT,)
"""Names that no operation reads and that `resolve` looks at."""


def resolve(operation: str, tensors: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The tensors to go on with, and the names of those left out.

    Log-probabilities that were not computed come as zeros [B, 1]; where R > 1 that is no value, and is left out.
    Distillation's old_student_log_probs is old_log_probs of the batch that has none.
    """
    kept = dict(tensors)
    dropped = [name for name in (_OLD, _STUDENT) if name in kept and _is_placeholder(kept[name], kept)]
    for name in dropped:
        del kept[name]
    if operation == "update_actor_with_distillation" and _STUDENT in kept and _OLD not in kept:
        kept[_OLD] = kept.pop(_STUDENT)
    return kept, dropped


def _is_placeholder(tensor: Any, tensors: Mapping[str, Any]) -> bool:
    """Whether a tensor is zeros of one column although the batch has more than one response position."""
    if not is_tensor(tensor) or tensor.ndim != 2 or tensor.shape[1] != 1 or bool((tensor != 0).any()):
        return False
    responses = tensors.get("responses")
    whole = tensors.get("input_ids")
    columns = _columns(responses) if responses is not None else _columns(whole) - 1
    return columns > 1


def _columns(tensor: Any) -> int:
    return int(tensor.shape[1]) if is_tensor(tensor) and tensor.ndim == 2 else 0
