"""initialize_worker's configuration: read here, because the service does not read its clients' files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._batch import json_object
from ._service_config import load_service_config
from .errors import InvalidSetup

_DEFAULT_ROLE = "actor"


def setup_params(
    identifier: str | None,
    own: Mapping[str, Any] | None,
    config_path: str | None = None,
    config_dict: Mapping[str, Any] | None = None,
    role: str = _DEFAULT_ROLE,
    world_size: int | None = None,
    zmq_base_port: int | None = None,
    dispatch_mode: str | None = None,
) -> dict[str, Any]:
    """The body of /initialize. config_dict wins over config_path, that over the client's own entry, own.

    The client's identifier wins over the configuration's; the role is the configuration's, unless another than
    actor is given. Raises InvalidSetup where there is no configuration, it cannot be read, or nothing names the group.
    """
    if config_dict is None and config_path is None and own is not None:
        config: Mapping[str, Any] = own
    elif config_dict is not None:
        config = config_dict
    elif config_path is not None:
        config = _choose(load_service_config(config_path), identifier, config_path)
    else:
        raise InvalidSetup("initialize_worker needs config_dict, or config_path to a YAML file")
    if not isinstance(config, Mapping):
        raise InvalidSetup(f"config_dict is {type(config).__name__}; give a dict")
    config = json_object({"config_dict": config}, "argument")["config_dict"]
    name = identifier or config.get("identifier")
    if not name:
        raise InvalidSetup("nothing names the worker group: give the client, or the configuration, an identifier")
    own_role = None if role == _DEFAULT_ROLE else role
    optional = {
        "role": own_role,
        "world_size": world_size,
        "zmq_base_port": zmq_base_port,
        "dispatch_mode": dispatch_mode,
    }
    given = {key: value for key, value in optional.items() if value is not None}
    return {"config_dict": config, "identifier": name, **given}


def _choose(entries: Mapping[str, Mapping[str, Any]], identifier: str | None, path: str) -> Mapping[str, Any]:
    """The group's entry: that with its identifier, else of its name, else the only one."""
    if identifier is not None:
        matching = [entry for entry in entries.values() if entry.get("identifier") == identifier]
        matching = matching or [entry for name, entry in entries.items() if name == identifier]
        if len(matching) == 1:
            return matching[0]
    if len(entries) == 1:
        return next(iter(entries.values()))
    raise InvalidSetup(
        f"config_path {path} has the train services {', '.join(entries)}; "
        f"give the client the identifier of one of them (it has {identifier!r})"
    )
