"""Which group a request means, and whether that group can take the operation now."""

from __future__ import annotations

import time
from typing import Any

from nexrl_contract import names
from nexrl_contract.errors import ServiceError
from nexrl_contract.operations import DESTROY, Operation
from nexrl_contract.records import GroupRecord
from nexrl_ledger import Ledger

from nexrl_gateway.services import Services

_START_S = 10.0
"""A gateway younger than that may be there before the agents of its stack."""


def named_identifier(query: str | None, document: dict[str, Any]) -> str | None:
    """The identifier of the query, else of the body, which loses it; raises INVALID_ARGUMENT where
    they differ."""
    inner = document.pop("identifier", None)
    if inner is not None and not isinstance(inner, str):
        raise ServiceError("INVALID_ARGUMENT", "identifier must be text", key="identifier")
    if query is not None and inner is not None and query != inner:
        raise ServiceError(
            "INVALID_ARGUMENT",
            "identifier in the query and in the body differ; send one",
            key="identifier",
        )
    return query if query is not None else inner


def resolve(ledger: Ledger, identifier: str | None) -> GroupRecord:
    """The group of that name, or the only living one for None; raises GROUP_NOT_FOUND or
    IDENTIFIER_REQUIRED."""
    if identifier is None:
        identifier = _only(ledger.groups.identifiers())
    group = ledger.groups.get(identifier) if names.valid_identifier(identifier) else None
    if group is None:
        shown = identifier[:100]
        raise ServiceError(
            "GROUP_NOT_FOUND",
            f"there is no worker group {shown!a}; initialize_worker makes one",
            identifier=shown,
        )
    return group


def admit(group: GroupRecord | None, operation: Operation) -> None:
    """Raise GROUP_NOT_READY, GROUP_DOWN or ROLE_UNSUPPORTED unless the group can take the operation
    now."""
    if group is None:
        raise ServiceError(
            "GROUP_NOT_READY", "the group has just been destroyed; initialize_worker makes it anew"
        )
    name = group.identifier
    if group.state == "destroyed":
        raise _refusal(
            group,
            "GROUP_NOT_READY",
            f"group {name!r} was destroyed; initialize_worker makes it anew",
        )
    if operation.name == DESTROY:
        return
    if group.state == "down":
        raise is_down(group)
    if group.state in ("placing", "starting"):
        if group.initialised:
            raise _refusal(
                group, "GROUP_DOWN", f"group {name!r} is being restarted; try again shortly"
            )
        raise _refusal(
            group,
            "GROUP_NOT_READY",
            f"group {name!r} is {group.state}; wait for initialize_worker to end",
        )
    if group.role not in operation.roles:
        allowed = ", ".join(operation.roles)
        raise _refusal(
            group,
            "ROLE_UNSUPPORTED",
            f"{operation.name} is for {allowed} groups; {name!r} is a {group.role}",
        )
    if operation.needs_model and group.state != "ready":
        raise _refusal(
            group, "GROUP_NOT_READY", f"group {name!r} has no model yet; call init_model first"
        )


def is_down(group: GroupRecord) -> ServiceError:
    """What a group that is down answers: no waiting brings it back."""
    message = (
        f"group {group.identifier!r} is down: {group.cause or 'unknown cause'}; destroy and "
        "initialize it"
    )
    return ServiceError(
        "GROUP_DOWN", message, retryable=False, identifier=group.identifier, cause=group.cause
    )


def without_agent(services: Services, **about: Any) -> ServiceError:
    """What a new group's placement answers while nobody could start it; retryable where an agent
    may be on its way."""
    return ServiceError(
        "GROUP_DOWN",
        "no worker agent is alive; start one (`nexrl up` and Compose start one with the rest, else "
        "`python -m nexrl_worker.agent`) and call initialize_worker again",
        retryable=time.time() - services.started_at < _START_S,
        **about,
    )


def _only(living: list[str]) -> str:
    if not living:
        raise ServiceError(
            "GROUP_NOT_FOUND", "there is no worker group yet; initialize_worker makes one"
        )
    if len(living) > 1:
        raise ServiceError(
            "IDENTIFIER_REQUIRED", f"name one of the groups: ?identifier={' or '.join(living[:10])}"
        )
    return living[0]


def _refusal(group: GroupRecord, code: str, message: str) -> ServiceError:
    return ServiceError(code, message, identifier=group.identifier, cause=group.cause)
