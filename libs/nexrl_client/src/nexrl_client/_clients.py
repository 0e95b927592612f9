"""Clients by backend name: one, or all of a service's configuration."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, Self

from nexrl_contract.operations import ROLES

from ._api import TrainServiceClient
from ._config import read_entries
from ._http import HTTPTrainServiceClient
from ._mock import MockTrainServiceClient
from .errors import ClientError, InvalidSetup, UnknownBackend, UnknownOption

_BACKENDS: dict[str, type[HTTPTrainServiceClient] | type[MockTrainServiceClient]] = {
    "self-hosted": HTTPTrainServiceClient,
    "http": HTTPTrainServiceClient,
    "nextrainer": HTTPTrainServiceClient,
    "mock": MockTrainServiceClient,
}


def create_train_service_client(
    backend: str, url: str, identifier: str | None = None, **options: Any
) -> TrainServiceClient:
    """A client of one worker group.

    backend "self-hosted", "http" or "nextrainer" is the service over HTTP, at url; "mock" needs no
    service. identifier names the group. options are keyword arguments of HTTPTrainServiceClient or
    MockTrainServiceClient, such as request_timeout. Raises UnknownBackend, UnknownOption or
    InvalidURL, all of them ValueErrors.
    """
    kind = _BACKENDS.get(backend)
    if kind is None:
        raise UnknownBackend(f"there is no backend {backend!r}; known are {', '.join(_BACKENDS)}")
    known = list(kind.__init__.__kwdefaults__ or ())
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}? Known" if close else "known"
            raise UnknownOption(
                f"backend {backend!r} has no option {name!r}; {hint} are {', '.join(known)}"
            )
    return kind(url, identifier, **options)


class TrainServiceClients(Mapping[str, TrainServiceClient]):
    """Clients by the names of their entries, clients["main_actor"], or by their roles,
    clients.by_role("teacher").

    Close them, or use this in a with statement. clients.roles has each name's role.
    """

    def __init__(self, clients: Mapping[str, TrainServiceClient], roles: Mapping[str, str]) -> None:
        self._clients = dict(clients)
        self.roles = dict(roles)
        """Each name's role."""

    def by_role(self, role: str) -> TrainServiceClient:
        """The client of the one service with this role; raises InvalidSetup where none has it, or
        several have."""
        names = [name for name, given in self.roles.items() if given == role]
        if len(names) == 1:
            return self._clients[names[0]]
        if names:
            several = f"the services {', '.join(names)} all have the role {role!r}"
            raise InvalidSetup(f"{several}; choose one by its name")
        others = ", ".join(f"{name} ({given})" for name, given in self.roles.items())
        raise InvalidSetup(f"no service has the role {role!r}; there are {others}")

    def close(self) -> None:
        """Close the connections of all of them; jobs go on."""
        for client in self._clients.values():
            if isinstance(client, HTTPTrainServiceClient):
                client.close()

    def __getitem__(self, name: str) -> TrainServiceClient:
        return self._clients[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._clients)

    def __len__(self) -> int:
        return len(self._clients)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"TrainServiceClients({self._clients})"


def create_train_service_clients(config: Mapping[str, Any], **options: Any) -> TrainServiceClients:
    """A client for each entry of a configuration.

    config is what load_service_config returned, a whole service's configuration, or one entry. An
    entry's keys backend, url, identifier and role make its client; without them they are "http",
    "http://localhost:8000", the entry's name and "actor". Each client's initialize_worker() needs
    no arguments. options go to every client, such as request_timeout. Raises InvalidSetup with the
    entry's name, and what create_train_service_client raises.
    """
    if not isinstance(config, Mapping):
        raise InvalidSetup(
            f"the configuration is {type(config).__name__}; give what load_service_config(path) "
            "returns"
        )
    entries = read_entries(config, "the configuration")
    roles = {name: str(entry.get("role") or "actor") for name, entry in entries.items()}
    for name, role in roles.items():
        if role not in ROLES:
            key, given = f"{name}.role", entries[name]["role"]
            known = ", ".join(ROLES)
            raise InvalidSetup(f"{key} is {given!r}; known are {known}", details={"key": key})
    clients: dict[str, TrainServiceClient] = {}
    groups: dict[tuple[str, str], str] = {}
    for name, entry in entries.items():
        backend = str(entry.get("backend") or "http")
        url = str(entry.get("url") or "http://localhost:8000")
        identifier = str(entry.get("identifier") or name)
        other = groups.setdefault((url, identifier), name)
        if other != name:
            raise InvalidSetup(
                f"{other} and {name} are one group, {identifier!r} at {url}; give each an "
                "identifier"
            )
        try:
            clients[name] = create_train_service_client(
                backend, url, identifier, config=entry, **options
            )
        except ClientError as error:
            raise type(error)(f"{name}: {error.message}") from error
    return TrainServiceClients(clients, roles)
