"""One table of error codes: the HTTP status of each, what it means, and whether the same request
may succeed later.

An error may say for itself that it is not retryable: GROUP_DOWN passes while the group restarts,
and not otherwise. Every error a user meets is a :class:`ServiceError`; its
:meth:`~ServiceError.body` is the one JSON shape of the whole service.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """What a code means over HTTP."""

    status: int
    meaning: str
    """What it says to whoever reads the page of errors; a message says more."""
    retryable: bool = False


ERRORS: dict[str, ErrorKind] = {
    "MALFORMED": ErrorKind(400, "the body is not what its Content-Type says"),
    "IDENTIFIER_REQUIRED": ErrorKind(400, "several groups live: name one"),
    "FOREIGN_ORIGIN": ErrorKind(403, "a browser sent this for another page"),
    "GROUP_NOT_FOUND": ErrorKind(404, "there is no such group"),
    "JOB_NOT_FOUND": ErrorKind(404, "there is no such job"),
    "PAYLOAD_NOT_FOUND": ErrorKind(404, "there is no such payload"),
    "NOT_FOUND": ErrorKind(404, "there is no such path"),
    "METHOD_NOT_ALLOWED": ErrorKind(405, "the path has no such method"),
    "SLOW_REQUEST": ErrorKind(408, "the request stopped coming", retryable=True),
    "GROUP_NOT_READY": ErrorKind(409, "another call must come before this one"),
    "GROUP_EXISTS": ErrorKind(409, "the group has other settings: destroy it first"),
    "ROLE_UNSUPPORTED": ErrorKind(409, "groups of this role have no such operation"),
    "IDEMPOTENCY_MISMATCH": ErrorKind(409, "the key was used for other content"),
    "JOB_RUNNING": ErrorKind(409, "the job has not ended: ask again"),
    "JOB_FINAL": ErrorKind(409, "the job has ended"),
    "JOB_CANCELLED": ErrorKind(409, "the job was cancelled"),
    "JOB_ROLLED_BACK": ErrorKind(409, "a restart took the job's effect from the weights"),
    "GRADIENTS_PENDING": ErrorKind(409, "gradients wait for optim_step"),
    "GRADIENTS_LOST": ErrorKind(409, "a restart took the pending gradients"),
    "EXPIRED": ErrorKind(410, "it was there and is kept no longer"),
    "TOO_LARGE": ErrorKind(413, "the body is larger than its limit"),
    "UNSUPPORTED_TYPE": ErrorKind(415, "no such Content-Type or Content-Encoding is known here"),
    "HOST_REFUSED": ErrorKind(421, "this gateway does not answer under that name"),
    "INVALID_ARGUMENT": ErrorKind(422, "an argument is unknown or unfit"),
    "INVALID_TENSOR": ErrorKind(422, "a tensor lacks, or has another shape or dtype"),
    "INVALID_VALUE": ErrorKind(422, "a tensor or argument holds what cannot be computed"),
    "INVALID_CONFIG": ErrorKind(422, "a key of the configuration is unknown or unfit"),
    "PATH_REFUSED": ErrorKind(422, "a path leads where requests may not"),
    "CHECKPOINT_INVALID": ErrorKind(422, "the folder is no checkpoint that fits"),
    "CHECKSUM_MISMATCH": ErrorKind(422, "bytes changed on their way", retryable=True),
    "NO_SUCH_SLOTS": ErrorKind(422, "no agent could ever hold the group"),
    "HDFS_NOT_CONFIGURED": ErrorKind(422, "this service has no HDFS"),
    "TOO_MANY_QUEUED": ErrorKind(429, "the group's queue is full", retryable=True),
    "HEADERS_TOO_LARGE": ErrorKind(431, "the request's headers are too large"),
    "OPERATION_FAILED": ErrorKind(500, "a rank raised what nobody expected"),
    "PAYLOAD_DAMAGED": ErrorKind(500, "stored bytes have changed", retryable=True),
    "INTERNAL": ErrorKind(500, "something unexpected went wrong: the log has it"),
    "GROUP_DOWN": ErrorKind(503, "the group has no ranks now", retryable=True),
    "REDIS_UNAVAILABLE": ErrorKind(503, "Redis does not answer", retryable=True),
    "STORE_UNAVAILABLE": ErrorKind(503, "the payload store does not answer", retryable=True),
    "GATEWAY_BUSY": ErrorKind(503, "the gateway has too much to do", retryable=True),
    "WAIT_LIMIT": ErrorKind(504, "the gateway waits no longer: the job goes on", retryable=True),
    "NO_SPACE": ErrorKind(507, "a disk is full", retryable=True),
}
RETRY_AFTER_S = 2


class ServiceError(Exception):
    """A refusal or failure with a code of :data:`ERRORS`; ``details`` are further JSON fields
    (tensor, row, key, nearest...).

    ``retryable`` is the code's unless given: whether waiting can make the same request succeed.
    """

    def __init__(self, code: str, message: str, **details: Any) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        given = details.pop("retryable", None)
        self.retryable: bool = self.kind.retryable if given is None else bool(given)
        self.details = {name: value for name, value in details.items() if value is not None}

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.code, self.message, self.retryable, self.details)

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"

    @property
    def kind(self) -> ErrorKind:
        """The row of :data:`ERRORS`."""
        return ERRORS[self.code]

    def body(self) -> dict[str, Any]:
        """The inner object of ``{"error": ...}``."""
        return {
            "code": self.code,
            "message": self.message,
            "retryable": self.retryable,
            "identifier": None,
            "job_id": None,
            "rank": None,
            **self.details,
        }

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> Self:
        """The inverse of :meth:`body`; an unknown code becomes ``INTERNAL``."""
        details = {
            key: value for key, value in body.items() if key not in ("code", "message", "retryable")
        }
        code = str(body.get("code", "INTERNAL"))
        if code not in ERRORS:
            return cls("INTERNAL", str(body.get("message", "")), **details)
        return cls(code, str(body.get("message", "")), retryable=body.get("retryable"), **details)


def _rebuild(code: str, message: str, retryable: bool, details: dict[str, Any]) -> ServiceError:
    return ServiceError(code, message, retryable=retryable, **details)
