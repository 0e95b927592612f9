"""The lower part of the error tree: a class for every code of nexrl_contract.errors, and the making of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nexrl_contract.errors import ERRORS

from ._errors_base import CONTEXT, Failed, Rejected, StatusError, Unavailable


class Malformed(Rejected):
    """Base64, frame, header or JSON that cannot be read."""

    default_code = "MALFORMED"


class IdentifierRequired(Rejected):
    """There are several worker groups: give the client an identifier."""

    default_code = "IDENTIFIER_REQUIRED"


class ForeignOrigin(Rejected):
    """A browser's page of another origin sent the request."""

    default_code = "FOREIGN_ORIGIN"


class GroupNotFound(Rejected):
    """No worker group has this identifier."""

    default_code = "GROUP_NOT_FOUND"


class JobNotFound(Rejected):
    """No job has this id."""

    default_code = "JOB_NOT_FOUND"


class PayloadNotFound(Rejected):
    """The uploaded parts are not there, or not all of them."""

    default_code = "PAYLOAD_NOT_FOUND"


class NotFound(Rejected):
    """No such path; the service may be older than the client."""

    default_code = "NOT_FOUND"


class MethodNotAllowed(Rejected):
    """The path exists, with another HTTP method."""

    default_code = "METHOD_NOT_ALLOWED"


class GroupNotReady(Rejected):
    """The group is starting, destroyed, or has not run init_model."""

    default_code = "GROUP_NOT_READY"


class GroupExists(Rejected):
    """The group lives with other settings; details name the differing keys."""

    default_code = "GROUP_EXISTS"


class RoleUnsupported(Rejected):
    """The group's role has no such operation."""

    default_code = "ROLE_UNSUPPORTED"


class IdempotencyMismatch(Rejected):
    """The idempotency key was used with other content."""

    default_code = "IDEMPOTENCY_MISMATCH"


class JobRunning(Rejected):
    """The job runs: it cannot be cancelled, and has no result yet."""

    default_code = "JOB_RUNNING"


class JobFinal(Rejected):
    """The job has ended already."""

    default_code = "JOB_FINAL"


class JobCancelled(Rejected):
    """The job was cancelled before it ran."""

    default_code = "JOB_CANCELLED"


class JobRolledBack(Rejected):
    """The job's effect was undone by a restart that could not replay it."""

    default_code = "JOB_ROLLED_BACK"


class GradientsPending(Rejected):
    """forward_backward left gradients: run optim_step first, with discard=True to drop them."""

    default_code = "GRADIENTS_PENDING"


class GradientsLost(Rejected):
    """The gradients that optim_step was to apply went with a restart; details name their jobs."""

    default_code = "GRADIENTS_LOST"


class Expired(Rejected):
    """The job's result, or the key, is older than the service keeps it."""

    default_code = "EXPIRED"


class TooLarge(Rejected):
    """The body is over the service's limit."""

    default_code = "TOO_LARGE"


class UnsupportedType(Rejected):
    """The service does not read this content type or encoding."""

    default_code = "UNSUPPORTED_TYPE"


class HostRefused(Rejected):
    """The service does not answer under this name; NEXRL_ALLOWED_HOSTS lists further ones."""

    default_code = "HOST_REFUSED"


class InvalidArgument(Rejected):
    """An argument is unknown or has a wrong value."""

    default_code = "INVALID_ARGUMENT"


class InvalidTensor(Rejected):
    """A tensor is missing, or has a wrong shape or dtype; details name it."""

    default_code = "INVALID_TENSOR"


class InvalidValue(Rejected):
    """A tensor holds a value it must not; details name tensor and row."""

    default_code = "INVALID_VALUE"


class InvalidConfig(Rejected):
    """A configuration key is unknown or has a wrong value; details name it and the nearest known one."""

    default_code = "INVALID_CONFIG"


class PathRefused(Rejected):
    """The path lies outside the service's roots."""

    default_code = "PATH_REFUSED"


class CheckpointInvalid(Rejected):
    """The checkpoint is not published, is damaged, or does not fit the group."""

    default_code = "CHECKPOINT_INVALID"


class NoSuchSlots(Rejected):
    """No agent could ever host this world size."""

    default_code = "NO_SUCH_SLOTS"


class HDFSNotConfigured(Rejected):
    """The service was started without HDFS."""

    default_code = "HDFS_NOT_CONFIGURED"


class HeadersTooLarge(Rejected):
    """The request's headers are over the service's limit."""

    default_code = "HEADERS_TOO_LARGE"


class OperationFailed(Failed):
    """The operation failed inside the group; rank and message say where and why."""

    default_code = "OPERATION_FAILED"


class PayloadDamaged(Failed):
    """The batch, or a result, changed while it was stored; the message says where. Nothing was applied of a batch."""

    default_code = "PAYLOAD_DAMAGED"


class InternalError(Failed):
    """The service has a fault; its logs know more."""

    default_code = "INTERNAL"


class TooManyQueued(Unavailable):
    """Too many jobs wait for this group."""

    default_code = "TOO_MANY_QUEUED"


class GroupDown(Unavailable):
    """The group is down (raised at once), restarting (waited for), or has no agent to start on; the message says why."""

    default_code = "GROUP_DOWN"


class RedisUnavailable(Unavailable):
    """The service cannot reach its records."""

    default_code = "REDIS_UNAVAILABLE"


class StoreUnavailable(Unavailable):
    """The service cannot reach its payload store."""

    default_code = "STORE_UNAVAILABLE"


class GatewayBusy(Unavailable):
    """The gateway has as many connections or JSON bodies as it takes at a time."""

    default_code = "GATEWAY_BUSY"


class SlowRequest(Unavailable):
    """The request's bytes stopped coming."""

    default_code = "SLOW_REQUEST"


class WaitLimit(Unavailable):
    """The service waits no longer for this one answer; the job goes on under job_id."""

    default_code = "WAIT_LIMIT"


class NoSpace(Unavailable):
    """The service's disk is full."""

    default_code = "NO_SPACE"


class ChecksumMismatch(Unavailable):
    """A part arrived damaged."""

    default_code = "CHECKSUM_MISMATCH"


def _by_code(kind: type[StatusError]) -> dict[str, type[StatusError]]:
    own = {kind.default_code: kind} if kind.default_code else {}
    return own | {code: leaf for child in kind.__subclasses__() for code, leaf in _by_code(child).items()}


BY_CODE: dict[str, type[StatusError]] = _by_code(StatusError)
"""The class of each code of the service."""


def status_error(status: int, body: Mapping[str, Any]) -> StatusError:
    """The error of an answer; body is the inner object of {"error": ...}, or empty where a proxy answered."""
    fields = dict(body)
    code = fields.pop("code", None)
    kind = BY_CODE.get(code) or _class_of_status(status)
    message = str(fields.pop("message", "") or f"HTTP status {status} without an explanation")
    retryable = fields.pop("retryable", ERRORS[code].retryable if code in ERRORS else status in (429, 502, 503, 504))
    context = {name: fields.pop(name, None) for name in CONTEXT}
    return kind(message, code=code, status=status, details={**fields, "retryable": bool(retryable)}, **context)


def _class_of_status(status: int) -> type[StatusError]:
    if status in (429, 502, 503, 504, 507):
        return Unavailable
    return Failed if status >= 500 else Rejected
