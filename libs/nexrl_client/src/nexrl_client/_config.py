"""A service's YAML, one entry for each worker group (service.train_service.<name>), and the body of
initialize_worker made of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from ._content import below, json_object
from .errors import InvalidSetup

Entry: TypeAlias = dict[str, Any]
_ROUTING = ("identifier", "role", "backend", "url")
_SERVICES = "service.train_service"


def load_service_config(path: str | Path) -> dict[str, Entry]:
    """The worker groups of a YAML file: configurations by name.

    They are the entries under service.train_service, or the file itself is the one entry, whose
    name is its identifier, else "default". The file is YAML 1.2: 2e-6 is a number, and a key stands
    once. Raises InvalidSetup for a file that cannot be read or holds no entry, and for any ${...}
    in an entry, with its path.
    """
    try:
        document = YAML(typ="safe", pure=True).load(Path(path).expanduser())
    except MarkedYAMLError as error:
        raise InvalidSetup(
            f"config_path {path} cannot be read: {error.problem}\n{error.problem_mark}"
        ) from error
    except (OSError, ValueError, YAMLError) as error:
        raise InvalidSetup(f"config_path {path} cannot be read: {error}") from error
    return read_entries(document, f"config_path {path}")


def read_entries(document: object, source: str) -> dict[str, Entry]:
    """The entries of a whole service's configuration, of what load_service_config gave, or of one
    entry, by name.

    source says in messages where the document is from. Raises InvalidSetup.
    """
    if not isinstance(document, Mapping):
        raise InvalidSetup(f"{source} holds {type(document).__name__}; it must hold a mapping")
    # A mapping of another library, such as OmegaConf, resolves its values when asked for them.
    config = document if isinstance(document, dict) else json_object(document, f"{source}:")
    service = config.get("service")
    services = service.get("train_service") if isinstance(service, Mapping) else None
    whole = isinstance(services, Mapping)
    found: Mapping[Any, Any] = services if isinstance(services, Mapping) else config
    prefix = _SERVICES if whole else ""
    if _is_entry(found):
        entries: dict[str, Any] = {str(found.get("identifier") or "default"): found}
    elif whole or (
        found and all(isinstance(entry, Mapping) and _is_entry(entry) for entry in found.values())
    ):
        entries = {str(name): entry for name, entry in found.items()}
    else:
        raise InvalidSetup(f"{source} has neither {_SERVICES} nor actor at its top")
    if not entries:
        raise InvalidSetup(
            f"{source} has nothing under {_SERVICES}; give each worker group an entry"
        )
    for name, entry in entries.items():
        if not isinstance(entry, Mapping):
            kind = type(entry).__name__
            raise InvalidSetup(f"{source}: {below(prefix, name)} is {kind}; it must be a mapping")
    for path, text in _strings(found, prefix, set()):
        if "${" in text:
            message = f"{source}: {path} is {text!r}, and interpolation is not resolved here"
            raise InvalidSetup(f"{message}; write the value", details={"key": path})
    return {name: dict(entry) for name, entry in entries.items()}


def setup_params(
    identifier: str | None,
    own: Mapping[str, Any] | None,
    config_path: str | None = None,
    config_dict: Mapping[str, Any] | None = None,
    role: str = "actor",
    world_size: int | None = None,
    zmq_base_port: int | None = None,
    dispatch_mode: str | None = None,
) -> dict[str, Any]:
    """The body of /initialize. config_dict wins over config_path, that over the client's own entry,
    own.

    The client's identifier wins over the configuration's; the role is the configuration's, unless
    another than actor is given. Raises InvalidSetup where there is no configuration, it cannot be
    read, or nothing names the group.
    """
    config = config_dict
    if config is None and config_path is not None:
        config = _choose(load_service_config(config_path), identifier, config_path)
    elif config is None:
        config = own
    if config is None:
        raise InvalidSetup("initialize_worker needs config_dict, or config_path to a YAML file")
    if not isinstance(config, Mapping):
        raise InvalidSetup(f"config_dict is {type(config).__name__}; give a dict")
    config = json_object({"config_dict": config}, "argument")["config_dict"]
    name = identifier or config.get("identifier")
    if not name:
        raise InvalidSetup(
            "nothing names the worker group: give the client, or the configuration, an identifier"
        )
    optional = {
        "role": None if role == "actor" else role,
        "world_size": world_size,
        "zmq_base_port": zmq_base_port,
        "dispatch_mode": dispatch_mode,
    }
    given = {key: value for key, value in optional.items() if value is not None}
    return {"config_dict": config, "identifier": name, **given}


def _is_entry(mapping: Mapping[str, Any]) -> bool:
    """Whether it is one entry, and not entries by name (one of which may be called actor)."""
    actor = mapping.get("actor")
    if isinstance(actor, Mapping) and not _is_entry(actor):
        return True
    return any(isinstance(mapping.get(name), str) for name in _ROUTING)


def _strings(value: object, path: str, seen: set[int]) -> Iterator[tuple[str, str]]:
    """Every string with its dotted path, in the order of the file; an alias that leads back is
    followed once."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping | list) and id(value) not in seen:
        seen.add(id(value))
        members = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, member in members:
            inner = f"{path}[{name}]" if isinstance(value, list) else below(path, name)
            yield from _strings(member, inner, seen)


def _choose(entries: Mapping[str, Entry], identifier: str | None, path: str) -> Entry:
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
