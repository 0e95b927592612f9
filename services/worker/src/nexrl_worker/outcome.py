"""What rank 0 sends for a job, and what running it gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Request:
    """One job as every rank gets it; ``seq`` operations are in the weights before it."""

    job_id: str
    operation: str
    params: dict[str, Any]
    seq: int
    payload: str | None = None
    checksum: str | None = None
    ignored: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an operation gives rank 0: JSON, tensors by name, or (``publish``) a second half for the
    checkpointer."""

    result: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    publish: dict[str, Any] | None = None
    applied: bool = False
    """Weights, optimizer or gradients are not what they were before."""
