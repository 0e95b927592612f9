"""What rank 0 sends for a job, what running it gives back, and how it is refused."""

from __future__ import annotations

import errno
import logging
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from nexrl_contract.errors import ServiceError
from nexrl_contract.records import JobRecord
from nexrl_storage.protocol import no_space

from nexrl_worker.training.errors import InvalidValue

_LONGEST_MESSAGE = 1000
_log = logging.getLogger(__name__)


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

    @classmethod
    def of(cls, job: JobRecord, seq: int) -> Self:
        """What the ranks need of a job."""
        payload, checksum = (job.payload.id, job.payload.checksum) if job.payload else (None, None)
        return cls(job.id, job.operation, job.params, seq, payload, checksum, job.ignored)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an operation gives rank 0: JSON, tensors by name, or (``publish``) a second half for the
    checkpointer."""

    result: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    publish: dict[str, Any] | None = None
    applied: bool = False
    """Weights, optimizer or gradients are not what they were before."""


class Refused(ServiceError):
    """An operation that every rank refuses, in step, and that has changed nothing: the job fails,
    the group goes on.

    Any other error of an operation, a plain ServiceError too, may be one rank's alone and ends the
    group.
    """


def as_service_error(error: Exception, rank: int) -> ServiceError:
    """What a rank tells the others of an error of its own."""
    if isinstance(error, ServiceError):
        return ServiceError(
            error.code, error.message[:_LONGEST_MESSAGE], **{**error.details, "rank": rank}
        )
    if isinstance(error, InvalidValue):
        return ServiceError(
            "INVALID_VALUE", error.message[:_LONGEST_MESSAGE], rank=rank, **error.details()
        )
    _log.exception("operation.refused rank=%d", rank)
    if isinstance(error, OSError) and no_space(error):
        return ServiceError(
            "NO_SPACE", f"rank {rank}: no space left for {error.filename}", rank=rank
        )
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        named = f"{error.filename}: {error.strerror}; choose a shorter path"
        return ServiceError("PATH_REFUSED", named[:_LONGEST_MESSAGE], rank=rank)
    message = f"rank {rank}: {type(error).__name__}: {error}"
    return ServiceError("OPERATION_FAILED", message[:_LONGEST_MESSAGE], rank=rank)
