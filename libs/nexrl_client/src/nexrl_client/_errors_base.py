"""The upper part of the error tree: what the caller did, and what the network or the service did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import requests.exceptions

if TYPE_CHECKING:
    from ._handle import JobHandle

CONTEXT = ("identifier", "job_id", "rank")


class NexRLError(Exception):
    """Base of all. code is a key of nexrl_contract.errors.ERRORS or None; details are the error's other JSON fields.

    status is the HTTP status, None where no answer came; all of them survive pickling.
    """

    default_code: ClassVar[str | None] = None

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
        context = " ".join(f"{name}={getattr(self, name)}" for name in CONTEXT if getattr(self, name) is not None)
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


class InvalidBatch(ClientError):
    """The batch has an unknown form, or holds what cannot be sent as a tensor."""

    default_code = "INVALID_TENSOR"


class InvalidSetup(ClientError):
    """The configuration is missing, unreadable, ambiguous, or names no worker group."""

    default_code = "INVALID_CONFIG"


class ClientClosed(ClientError):
    """The client is closed: make a new one."""


class ServiceFault(NexRLError, requests.exceptions.RequestException):
    """Not the caller's mistake alone: the network, the service, or its refusal."""


class Unreachable(ServiceFault, requests.exceptions.ConnectionError):
    """No connection could be made, or it broke, and retries did not help."""


class InvalidAnswer(ServiceFault):
    """Something answered that does not speak as the service does; check the URL."""


class ServiceTimeout(ServiceFault, requests.exceptions.Timeout):
    """The time is spent. .job is the job's handle; it goes on. None where no answer told which job it is."""


class StatusError(ServiceFault, requests.exceptions.HTTPError):
    """An answer that is not 2xx. Codes that this version does not know are of the class of their status."""


class Rejected(StatusError):
    """The request cannot succeed as it is; nothing changed."""


class Failed(StatusError):
    """The operation, or the service, failed."""


class Unavailable(StatusError):
    """The same request may succeed later; raised when retries have spent the time."""
