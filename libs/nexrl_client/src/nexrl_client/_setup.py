"""initialize_worker's configuration: read here, because the service does not read its clients' files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from nexrl_contract import yaml12

from .errors import InvalidSetup


def setup_params(
    identifier: str | None,
    config_path: str | None = None,
    config_dict: Mapping[str, Any] | None = None,
    role: str = "actor",
    world_size: int | None = None,
    zmq_base_port: int | None = None,
    dispatch_mode: str | None = None,
) -> dict[str, Any]:
    """The body of /initialize. config_dict wins over config_path, the client's identifier over the configuration's.

    Raises InvalidSetup where there is no configuration, it cannot be read, or nothing names the group.
    """
    if config_dict is None and config_path is None:
        raise InvalidSetup("initialize_worker needs config_dict, or config_path to a YAML file")
    config = config_dict if config_dict is not None else read_entry(Path(str(config_path)), identifier)
    if not isinstance(config, Mapping):
        raise InvalidSetup(f"config_dict is {type(config).__name__}; give a dict")
    name = identifier or config.get("identifier")
    if not name:
        raise InvalidSetup("nothing names the worker group: give the client, or the configuration, an identifier")
    optional = {"world_size": world_size, "zmq_base_port": zmq_base_port, "dispatch_mode": dispatch_mode}
    given = {key: value for key, value in optional.items() if value is not None}
    return {"config_dict": dict(config), "role": role, "identifier": name, **given}


def read_entry(path: Path, identifier: str | None) -> Mapping[str, Any]:
    """The entry for this group in a YAML file: the file itself, or one of its service.train_service.<name>."""
    try:
        document = yaml12.load_file(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InvalidSetup(f"config_path {path} cannot be read: {error}") from error
    if not isinstance(document, Mapping):
        raise InvalidSetup(f"config_path {path} holds {type(document).__name__}; it must hold a mapping")
    service = document.get("service")
    entries = service.get("train_service") if isinstance(service, Mapping) else None
    if not isinstance(entries, Mapping):
        if "actor" in document:
            return document
        raise InvalidSetup(f"config_path {path} has neither service.train_service nor actor at its top")
    return entries if "actor" in entries else _choose(entries, identifier, path)


def _choose(entries: Mapping[str, Any], identifier: str | None, path: Path) -> Mapping[str, Any]:
    named = {name: entry for name, entry in entries.items() if isinstance(entry, Mapping)}
    if identifier is not None:
        matching = [entry for entry in named.values() if entry.get("identifier") == identifier]
        matching = matching or [entry for name, entry in named.items() if name == identifier]
        if len(matching) == 1:
            return matching[0]
    if len(named) == 1:
        return next(iter(named.values()))
    raise InvalidSetup(
        f"config_path {path} has the train services {', '.join(map(str, named)) or 'none'}; "
        f"give the client the identifier of one of them (it has {identifier!r})"
    )
