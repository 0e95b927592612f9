"""create_train_service_client: a client by the name of its backend."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from ._api import TrainServiceClient
from ._http import HTTPTrainServiceClient
from ._mock import MockTrainServiceClient
from .errors import UnknownBackend, UnknownOption

_BACKENDS: dict[str, type[HTTPTrainServiceClient] | type[MockTrainServiceClient]] = {
    "self-hosted": HTTPTrainServiceClient,
    "http": HTTPTrainServiceClient,
    "nextrainer": HTTPTrainServiceClient,
    "mock": MockTrainServiceClient,
}


def create_train_service_client(
    backend: str, url: str, identifier: str | None = None, **options: Any
) -> TrainServiceClient:
    """A client for a backend: "self-hosted", "http" and "nextrainer" are the service over HTTP, "mock" needs none.

    options are the keyword arguments of the client's class, such as request_timeout. Raises UnknownBackend,
    UnknownOption or InvalidURL, all of them ValueErrors.
    """
    kind = _BACKENDS.get(backend)
    if kind is None:
        raise UnknownBackend(f"there is no backend {backend!r}; known are {', '.join(_BACKENDS)}")
    parameters = inspect.signature(kind).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}? Known" if close else "known"
            raise UnknownOption(f"backend {backend!r} has no option {name!r}; {hint} are {', '.join(known)}")
    return kind(url, identifier, **options)
