"""One table of error codes: the HTTP status of each and whether the same request may succeed later.

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
    retryable: bool = False


ERRORS: dict[str, ErrorKind] = {
    "MALFORMED": ErrorKind(400),
    "IDENTIFIER_REQUIRED": ErrorKind(400),
    "FOREIGN_ORIGIN": ErrorKind(403),
    "GROUP_NOT_FOUND": ErrorKind(404),
    "JOB_NOT_FOUND": ErrorKind(404),
    "PAYLOAD_NOT_FOUND": ErrorKind(404),
    "NOT_FOUND": ErrorKind(404),
    "METHOD_NOT_ALLOWED": ErrorKind(405),
    "SLOW_REQUEST": ErrorKind(408, retryable=True),
    "GROUP_NOT_READY": ErrorKind(409),
    "GROUP_EXISTS": ErrorKind(409),
    "ROLE_UNSUPPORTED": ErrorKind(409),
    "IDEMPOTENCY_MISMATCH": ErrorKind(409),
    "JOB_RUNNING": ErrorKind(409),
    "JOB_FINAL": ErrorKind(409),
    "JOB_CANCELLED": ErrorKind(409),
    "JOB_ROLLED_BACK": ErrorKind(409),
    "GRADIENTS_PENDING": ErrorKind(409),
    "GRADIENTS_LOST": ErrorKind(409),
    "EXPIRED": ErrorKind(410),
    "TOO_LARGE": ErrorKind(413),
    "UNSUPPORTED_TYPE": ErrorKind(415),
    "HOST_REFUSED": ErrorKind(421),
    "INVALID_ARGUMENT": ErrorKind(422),
    "INVALID_TENSOR": ErrorKind(422),
    "INVALID_VALUE": ErrorKind(422),
    "INVALID_CONFIG": ErrorKind(422),
    "PATH_REFUSED": ErrorKind(422),
    "CHECKPOINT_INVALID": ErrorKind(422),
    "CHECKSUM_MISMATCH": ErrorKind(422, retryable=True),
    "NO_SUCH_SLOTS": ErrorKind(422),
    "HDFS_NOT_CONFIGURED": ErrorKind(422),
    "TOO_MANY_QUEUED": ErrorKind(429, retryable=True),
    "HEADERS_TOO_LARGE": ErrorKind(431),
    "OPERATION_FAILED": ErrorKind(500),
    "PAYLOAD_DAMAGED": ErrorKind(500, retryable=True),
    "INTERNAL": ErrorKind(500),
    "GROUP_DOWN": ErrorKind(503, retryable=True),
    "REDIS_UNAVAILABLE": ErrorKind(503, retryable=True),
    "STORE_UNAVAILABLE": ErrorKind(503, retryable=True),
    "GATEWAY_BUSY": ErrorKind(503, retryable=True),
    "WAIT_LIMIT": ErrorKind(504, retryable=True),
    "NO_SPACE": ErrorKind(507, retryable=True),
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
