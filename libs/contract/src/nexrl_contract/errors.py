"""One table of error codes: the HTTP status of each, what it means, and whether the same request
may succeed later.

An error may say for itself that it is not retryable: GROUP_DOWN passes while the group restarts,
and not otherwise. Every error a user meets is a :class:`ServiceError`; its
:meth:`~ServiceError.body` is the one JSON shape of the whole service.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
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
    "IDENTIFIER_REQUIRED": ErrorKind(400, "there are several groups: name one by its identifier"),
    "FOREIGN_ORIGIN": ErrorKind(403, "a browser sent this for another page"),
    "GROUP_NOT_FOUND": ErrorKind(404, "there is no such group"),
    "JOB_NOT_FOUND": ErrorKind(404, "there is no such job"),
    "PAYLOAD_NOT_FOUND": ErrorKind(404, "there is no such payload"),
    "NOT_FOUND": ErrorKind(404, "there is no such path: the service may be older than the client"),
    "METHOD_NOT_ALLOWED": ErrorKind(405, "the path has no such method"),
    "SLOW_REQUEST": ErrorKind(408, "the request stopped coming", retryable=True),
    "GROUP_NOT_READY": ErrorKind(
        409, "the group is starting or destroyed, or has not run init_model"
    ),
    "GROUP_EXISTS": ErrorKind(
        409, "the group lives with other settings, which are named: destroy it first"
    ),
    "ROLE_UNSUPPORTED": ErrorKind(409, "groups of this role have no such operation"),
    "IDEMPOTENCY_MISMATCH": ErrorKind(409, "the key was used for other content"),
    "JOB_RUNNING": ErrorKind(
        409, "the job has not ended: ask again, and it cannot be cancelled any more"
    ),
    "JOB_FINAL": ErrorKind(409, "the job has ended already"),
    "JOB_CANCELLED": ErrorKind(409, "the job was cancelled before it ran"),
    "JOB_ROLLED_BACK": ErrorKind(409, "a restart took the job's effect from the weights"),
    "GRADIENTS_PENDING": ErrorKind(
        409, "gradients wait: run optim_step first, with discard=True to drop them"
    ),
    "GRADIENTS_LOST": ErrorKind(409, "a restart took the pending gradients: their jobs are named"),
    "EXPIRED": ErrorKind(410, "the result, or the key, is older than the service keeps it"),
    "TOO_LARGE": ErrorKind(413, "the body is larger than its limit"),
    "UNSUPPORTED_TYPE": ErrorKind(415, "no such Content-Type or Content-Encoding is known here"),
    "HOST_REFUSED": ErrorKind(
        421, "this gateway does not answer under that name: see NEXRL_ALLOWED_HOSTS"
    ),
    "INVALID_ARGUMENT": ErrorKind(422, "an argument is unknown or has a wrong value"),
    "INVALID_TENSOR": ErrorKind(
        422, "a tensor, which is named, is missing or has a wrong shape or dtype"
    ),
    "INVALID_VALUE": ErrorKind(
        422, "a tensor or argument holds what cannot be computed: tensor and row are named"
    ),
    "INVALID_CONFIG": ErrorKind(
        422, "a key of the configuration is unknown or has a wrong value: the nearest is named"
    ),
    "PATH_REFUSED": ErrorKind(422, "the path lies outside the roots of the service"),
    "CHECKPOINT_INVALID": ErrorKind(
        422, "the folder is not published, is damaged, or does not fit the group"
    ),
    "CHECKSUM_MISMATCH": ErrorKind(
        422, "bytes changed on their way: they are sent again", retryable=True
    ),
    "NO_SUCH_SLOTS": ErrorKind(422, "no agent could ever host the world size"),
    "HDFS_NOT_CONFIGURED": ErrorKind(422, "the service was started without HDFS"),
    "TOO_MANY_QUEUED": ErrorKind(429, "too many jobs wait for the group", retryable=True),
    "HEADERS_TOO_LARGE": ErrorKind(431, "the request's headers are too large"),
    "OPERATION_FAILED": ErrorKind(
        500, "the operation failed on a rank: the message says where and why"
    ),
    "PAYLOAD_DAMAGED": ErrorKind(
        500,
        "a batch or a result changed while it was stored: nothing was applied of a batch",
        retryable=True,
    ),
    "INTERNAL": ErrorKind(500, "the service has a fault: its log knows more"),
    "GROUP_DOWN": ErrorKind(
        503,
        "the group is down, is restarting, or finds no agent: the message says which",
        retryable=True,
    ),
    "REDIS_UNAVAILABLE": ErrorKind(
        503, "the service cannot reach its records in Redis", retryable=True
    ),
    "STORE_UNAVAILABLE": ErrorKind(
        503, "the service cannot reach its payload store", retryable=True
    ),
    "GATEWAY_BUSY": ErrorKind(
        503,
        "the gateway has as many connections or large bodies as it takes at a time",
        retryable=True,
    ),
    "WAIT_LIMIT": ErrorKind(
        504, "the gateway waits no longer for this answer: the job goes on", retryable=True
    ),
    "NO_SPACE": ErrorKind(507, "a disk of the service is full", retryable=True),
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


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that ``word`` abbreviates to (``learning_rate``: ``lr``) or resembles most,
    None when nothing is close."""
    words = list(known)
    initials = "".join(part[:1] for part in word.split("_"))
    if len(initials) > 1 and initials in words:
        return initials
    matches = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return matches[0] if matches else None


def argument_error(errors: Sequence[Mapping[str, Any]], known: Iterable[str] = ()) -> ServiceError:
    """INVALID_ARGUMENT for the first of pydantic's errors, naming the argument and the nearest of
    ``known``."""
    first, known = errors[0], list(known)
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "literal_error":
        values, given = literals_of(first), str(first["input"])[:100]
        message = f"{key} {given!a} is not one of {', '.join(values)}"
        return ServiceError("INVALID_ARGUMENT", message, key=key, nearest=nearest(given, values))
    if first["type"] != "extra_forbidden":
        return ServiceError("INVALID_ARGUMENT", f"{key}: {first['msg']}", key=key)
    close = nearest(key, known)
    hint = f"did you mean {close}?" if close else f"known are {', '.join(known) or 'none'}"
    return ServiceError(
        "INVALID_ARGUMENT", f"unknown argument {key[:100]!a}; {hint}", key=key[:100], nearest=close
    )


def literals_of(error: Mapping[str, Any]) -> list[str]:
    """The values that one of pydantic's errors names, where it is about a value that is none of
    them."""
    return re.findall("'([^']+)'", error["msg"]) if error["type"] == "literal_error" else []
