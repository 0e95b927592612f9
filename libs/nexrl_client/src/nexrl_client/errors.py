"""Every error of the client.

The network's and the service's faults are requests.exceptions.RequestException too.

NexRLError
├── ClientError                 misuse, nothing was sent (also ValueError)
│   ├── InvalidURL              the address is no http or https address
│   ├── UnknownBackend, UnknownOption       create_train_service_client
│   ├── UnknownOperation        submit
│   ├── InvalidBatch            a batch that cannot be sent as it is
│   ├── InvalidSetup            initialize_worker's configuration cannot be read, or names no group
│   └── ClientClosed            the client was closed before the call
└── ServiceFault                (also RequestException)
    ├── Unreachable             no connection, or a lost one, in all the time (also ConnectionError)
    ├── InvalidAnswer           not the service's (a proxy's page, a broken frame)
    ├── ServiceTimeout          no result in time; .job is the job, which goes on (also Timeout)
    └── StatusError             the service, or a proxy before it, said no (also HTTPError)
        ├── Rejected            4xx: the request cannot succeed as it is, and changed nothing
        │   ├── Malformed, TooLarge, HeadersTooLarge, UnsupportedType, IdentifierRequired
        │   ├── MethodNotAllowed
        │   ├── ForeignOrigin, HostRefused
        │   ├── GroupNotFound, JobNotFound, PayloadNotFound, NotFound, Expired
        │   ├── GroupNotReady, GroupExists, RoleUnsupported, IdempotencyMismatch
        │   ├── GradientsPending, GradientsLost
        │   ├── JobRunning, JobFinal, JobCancelled, JobRolledBack
        │   ├── InvalidArgument, InvalidTensor, InvalidValue, InvalidConfig
        │   └── PathRefused, CheckpointInvalid, NoSuchSlots, HDFSNotConfigured
        ├── Failed              500: the operation (.rank says where) or the service failed
        │   └── OperationFailed, PayloadDamaged, InternalError
        └── Unavailable         the same request may succeed later
            ├── TooManyQueued, GroupDown, RedisUnavailable, StoreUnavailable
            ├── GatewayBusy, SlowRequest
            └── WaitLimit, NoSpace, ChecksumMismatch
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import requests.exceptions
from nexrl_contract.errors import ERRORS

if TYPE_CHECKING:
    from ._handle import JobHandle

__all__ = [
    "CheckpointInvalid", "ChecksumMismatch", "ClientClosed", "ClientError", "Expired", "Failed",
    "ForeignOrigin", "GatewayBusy", "GradientsLost", "GradientsPending", "GroupDown", "GroupExists",
    "GroupNotFound", "GroupNotReady", "HDFSNotConfigured", "HeadersTooLarge", "HostRefused",
    "IdempotencyMismatch", "IdentifierRequired", "InternalError", "InvalidAnswer",
    "InvalidArgument",
    "InvalidBatch", "InvalidConfig", "InvalidSetup", "InvalidTensor", "InvalidURL", "InvalidValue",
    "JobCancelled", "JobFinal", "JobNotFound", "JobRolledBack", "JobRunning", "Malformed",
    "MethodNotAllowed", "NexRLError", "NoSpace", "NoSuchSlots", "NotFound", "OperationFailed",
    "PathRefused", "PayloadDamaged", "PayloadNotFound", "RedisUnavailable", "Rejected",
    "RoleUnsupported", "ServiceFault", "ServiceTimeout", "SlowRequest", "StatusError",
    "StoreUnavailable", "TooLarge", "TooManyQueued", "Unavailable", "UnknownBackend",
    "UnknownOperation", "UnknownOption", "Unreachable", "UnsupportedType", "WaitLimit",
]  # fmt: skip

CONTEXT = ("identifier", "job_id", "rank")


class NexRLError(Exception):
    """Base of all errors of the client.

    error.code is the service's code, or None. error.status is the HTTP status, None where no answer
    came. error.identifier, error.job_id and error.rank say where, error.job is a handle of the job
    that goes on. error.details are the other fields of the service's answer, such as "tensor",
    "row", "key", "nearest" and "retryable". All of them survive pickling.
    """

    default_code: ClassVar[str | None] = None

    def __init_subclass__(cls, *, code: str | None = None) -> None:
        """``code`` is a code of the service that means this class; its meaning is the docstring."""
        cls.default_code = code or cls.default_code
        if cls.__doc__ is None and code:
            meaning = ERRORS[code].meaning
            cls.__doc__ = f"{meaning[:1].upper()}{meaning[1:]}."

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        status: int | None = None,
        identifier: str | None = None,
        job_id: str | None = None,
        rank: int | None = None,
        details: Mapping[str, Any] | None = None,
        job: JobHandle | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.status = status
        self.identifier = identifier
        self.job_id = job_id
        self.rank = rank
        self.details = dict(details or {})
        self.job = job

    def __str__(self) -> str:
        context = " ".join(
            f"{name}={getattr(self, name)}" for name in CONTEXT if getattr(self, name) is not None
        )
        prefix = f"{self.code}: " if self.code else ""
        return f"{prefix}{self.message}" + (f" [{context}]" if context else "")

    def __reduce__(self) -> tuple[Any, ...]:
        names = ("code", "status", *CONTEXT, "details", "job")
        return _rebuild, (type(self), self.message, {name: getattr(self, name) for name in names})


def _rebuild(kind: type[NexRLError], message: str, fields: dict[str, Any]) -> NexRLError:
    return kind(message, **fields)


class ClientError(NexRLError, ValueError):
    """The caller's mistake, found before anything was sent."""


class InvalidURL(ClientError):
    """The base URL is empty, or not of http or https."""


class UnknownBackend(ClientError):
    """create_train_service_client knows no such backend."""


class UnknownOption(ClientError):
    """create_train_service_client knows no such option for this backend."""


class UnknownOperation(ClientError):
    """submit knows no such operation."""


class InvalidBatch(ClientError, code="INVALID_TENSOR"):
    """The batch has an unknown form, or holds what cannot be sent as a tensor."""


class InvalidSetup(ClientError, code="INVALID_CONFIG"):
    """The configuration is missing, unreadable, ambiguous, or names no worker group."""


class ClientClosed(ClientError):
    """The client is closed: make a new one."""


class ServiceFault(NexRLError, requests.exceptions.RequestException):
    """Not the caller's mistake alone: the network, the service, or its refusal."""


class Unreachable(ServiceFault, requests.exceptions.ConnectionError):
    """No connection could be made, or it broke, and retries did not help."""


class InvalidAnswer(ServiceFault):
    """Something answered that does not speak as the service does; check the URL."""


class ServiceTimeout(ServiceFault, requests.exceptions.Timeout):
    """The time is spent. .job is the job's handle; it goes on. None where no answer told which job
    it is."""


class StatusError(ServiceFault, requests.exceptions.HTTPError):
    """An answer that is not 2xx. Codes that this version does not know are of the class of their
    status."""


class Rejected(StatusError):
    """The request cannot succeed as it is; nothing changed."""


class Failed(StatusError):
    """The operation, or the service, failed."""


class Unavailable(StatusError):
    """The same request may succeed later; raised when retries have spent the time."""


# A line for each code of nexrl_contract.errors.ERRORS, whose row says what it means.
# fmt: off
class Malformed(Rejected, code="MALFORMED"): ...
class IdentifierRequired(Rejected, code="IDENTIFIER_REQUIRED"): ...
class ForeignOrigin(Rejected, code="FOREIGN_ORIGIN"): ...
class GroupNotFound(Rejected, code="GROUP_NOT_FOUND"): ...
class JobNotFound(Rejected, code="JOB_NOT_FOUND"): ...
class PayloadNotFound(Rejected, code="PAYLOAD_NOT_FOUND"): ...
class NotFound(Rejected, code="NOT_FOUND"): ...
class MethodNotAllowed(Rejected, code="METHOD_NOT_ALLOWED"): ...
class GroupNotReady(Rejected, code="GROUP_NOT_READY"): ...
class GroupExists(Rejected, code="GROUP_EXISTS"): ...
class RoleUnsupported(Rejected, code="ROLE_UNSUPPORTED"): ...
class IdempotencyMismatch(Rejected, code="IDEMPOTENCY_MISMATCH"): ...
class JobRunning(Rejected, code="JOB_RUNNING"): ...
class JobFinal(Rejected, code="JOB_FINAL"): ...
class JobCancelled(Rejected, code="JOB_CANCELLED"): ...
class JobRolledBack(Rejected, code="JOB_ROLLED_BACK"): ...
class GradientsPending(Rejected, code="GRADIENTS_PENDING"): ...
class GradientsLost(Rejected, code="GRADIENTS_LOST"): ...
class Expired(Rejected, code="EXPIRED"): ...
class TooLarge(Rejected, code="TOO_LARGE"): ...
class UnsupportedType(Rejected, code="UNSUPPORTED_TYPE"): ...
class HostRefused(Rejected, code="HOST_REFUSED"): ...
class InvalidArgument(Rejected, code="INVALID_ARGUMENT"): ...
class InvalidTensor(Rejected, code="INVALID_TENSOR"): ...
class InvalidValue(Rejected, code="INVALID_VALUE"): ...
class InvalidConfig(Rejected, code="INVALID_CONFIG"): ...
class PathRefused(Rejected, code="PATH_REFUSED"): ...
class CheckpointInvalid(Rejected, code="CHECKPOINT_INVALID"): ...
class NoSuchSlots(Rejected, code="NO_SUCH_SLOTS"): ...
class HDFSNotConfigured(Rejected, code="HDFS_NOT_CONFIGURED"): ...
class HeadersTooLarge(Rejected, code="HEADERS_TOO_LARGE"): ...
class OperationFailed(Failed, code="OPERATION_FAILED"): ...
class PayloadDamaged(Failed, code="PAYLOAD_DAMAGED"): ...
class InternalError(Failed, code="INTERNAL"): ...
class TooManyQueued(Unavailable, code="TOO_MANY_QUEUED"): ...
class GroupDown(Unavailable, code="GROUP_DOWN"): ...
class RedisUnavailable(Unavailable, code="REDIS_UNAVAILABLE"): ...
class StoreUnavailable(Unavailable, code="STORE_UNAVAILABLE"): ...
class GatewayBusy(Unavailable, code="GATEWAY_BUSY"): ...
class SlowRequest(Unavailable, code="SLOW_REQUEST"): ...
class WaitLimit(Unavailable, code="WAIT_LIMIT"): ...
class NoSpace(Unavailable, code="NO_SPACE"): ...
class ChecksumMismatch(Unavailable, code="CHECKSUM_MISMATCH"): ...
# fmt: on


def _by_code(kind: type[StatusError]) -> dict[str, type[StatusError]]:
    own = {kind.default_code: kind} if kind.default_code else {}
    return own | {
        code: leaf for child in kind.__subclasses__() for code, leaf in _by_code(child).items()
    }


BY_CODE: dict[str, type[StatusError]] = _by_code(StatusError)
"""The class of each code of the service."""


def status_error(status: int, body: Mapping[str, Any]) -> StatusError:
    """The error of an answer; body is the inner object of {"error": ...}, or empty where a proxy
    answered."""
    fields = dict(body)
    code = fields.pop("code", None)
    kind = BY_CODE.get(code) or _class_of_status(status)
    message = str(fields.pop("message", "") or f"HTTP status {status} without an explanation")
    retryable = fields.pop(
        "retryable", ERRORS[code].retryable if code in ERRORS else status in (429, 502, 503, 504)
    )
    context = {name: fields.pop(name, None) for name in CONTEXT}
    return kind(
        message,
        code=code,
        status=status,
        details={**fields, "retryable": bool(retryable)},
        **context,
    )


def _class_of_status(status: int) -> type[StatusError]:
    if status in (429, 502, 503, 504, 507):
        return Unavailable
    return Failed if status >= 500 else Rejected
