"""Making and ending groups: the two operations whose job may not run in a group."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

from nexrl_contract import names
from nexrl_contract.config import (
    check_role,
    checked_argument_error,
    completed,
    differing_keys,
    parse_config,
)
from nexrl_contract.errors import ServiceError
from nexrl_contract.operations import INITIALIZE, InitializeParams
from nexrl_contract.records import GroupRecord, JobRecord
from nexrl_ledger import Fenced, Ledger
from pydantic import ValidationError

from nexrl_gateway.admission import is_down, without_agent
from nexrl_gateway.paths import Roots
from nexrl_gateway.services import Services
from nexrl_gateway.submit import fingerprint, log_accepted

_RACES = 5


@dataclass(frozen=True, slots=True)
class Wanted:
    """A checked request for a group; ``settings`` are the effective ``actor`` keys with absolute
    model paths.

    ``meant`` are the folders that relative ones stand for, by key.
    """

    identifier: str
    role: str
    world_size: int
    settings: dict[str, Any]
    ignored: list[str]
    meant: dict[str, str]

    @property
    def said(self) -> dict[str, Any]:
        """What the answer says of relative paths."""
        return {"paths": self.meant} if self.meant else {}

    def differs(self, group: GroupRecord) -> list[str]:
        """Names of the settings in which ``group`` is another one."""
        keys = differing_keys(completed(group.config), self.settings, "actor.")
        keys += ["role"] if group.role != self.role else []
        return keys + (["world_size"] if group.world_size != self.world_size else [])


class _Appeared(Exception):
    """Somebody else made the group in the meantime."""


def read_wanted(document: dict[str, Any], identifier: str | None, roots: Roots) -> Wanted:
    """Check ``initialize``'s body; raises INVALID_ARGUMENT, INVALID_CONFIG, PATH_REFUSED or
    IDENTIFIER_REQUIRED."""
    try:
        body = InitializeParams.model_validate(document)
    except ValidationError as error:
        raise checked_argument_error(error, list(InitializeParams.model_fields)) from None
    if body.config_path is not None:
        raise ServiceError(
            "INVALID_ARGUMENT",
            "config_path is read by the client; send its content as config_dict",
            key="config_path",
        )
    if body.config_dict is None:
        raise ServiceError(
            "INVALID_ARGUMENT",
            "config_dict is missing; it needs at least actor.model.path",
            key="config_dict",
        )
    named = body.config_dict.get("role")
    role = check_role(body.role or named or "actor")
    config = parse_config(body.config_dict, role)
    world_size = body.world_size or config.entry.resource.world_size
    if world_size is None:
        raise ServiceError(
            "INVALID_ARGUMENT",
            "give world_size, or resource.world_size in config_dict",
            key="world_size",
        )
    unused = [
        name for name in ("zmq_base_port", "dispatch_mode") if getattr(body, name) is not None
    ]
    unused += ["role"] if named not in (None, role) else []
    settings, meant = _with_model_paths(config.settings(world_size), roots)
    return Wanted(
        identifier=_checked_identifier(
            body.config_dict.get("identifier") if identifier is None else identifier
        ),
        role=role,
        world_size=world_size,
        settings=settings,
        ignored=[*config.ignored, *unused],
        meant=meant,
    )


def initialize(
    services: Services, wanted: Wanted, key: str | None
) -> tuple[GroupRecord, JobRecord | None, bool]:
    """The group, the job that places it (None where that is forgotten), and whether the group was
    there already.

    Raises GROUP_EXISTS, GROUP_DOWN, NO_SUCH_SLOTS and what the ledger raises.
    """
    ledger = services.ledger
    mark = fingerprint(
        INITIALIZE,
        wanted.identifier,
        {"wanted": [wanted.role, wanted.world_size, wanted.settings]},
        "",
    )
    first = ledger.replay_of(key, mark)
    if first is not None:
        return _group_of(ledger, wanted, first.id), first, False
    for _ in range(_RACES):
        group = ledger.groups.get(wanted.identifier)
        if group is not None and group.state != "destroyed":
            return _existing(services, group, wanted)
        waits_for = _slots_awaited(services, wanted)
        try:
            return _place(ledger, wanted, key, mark, waits_for)
        except _Appeared:
            continue
    raise ServiceError(
        "GROUP_EXISTS",
        f"group {wanted.identifier!r} is being made and destroyed by others; try again",
    )


def destroy_idle(services: Services, job: JobRecord) -> None:
    """Run a ``destroy`` job ourselves where the group has no ranks that could: it waits for slots,
    or is down.

    Safe to repeat: a gateway that died half-way is made good by the next one that gets the same
    request.
    """
    ledger = services.ledger
    group = ledger.groups.get(job.identifier)
    if group is None or group.state not in ("placing", "down", "destroyed"):
        return
    if ledger.require_job(
        job.id
    ).final:  # read after the group: while it has not ended, it means that group
        return
    if group.state == "placing" and not _withdrawn(ledger, group):
        return
    with contextlib.suppress(
        Fenced
    ):  # started meanwhile: its ranks run the job, which is still queued
        ledger.groups.mark_destroyed(job.identifier, group.epoch)


def cancel(services: Services, job_id: str) -> JobRecord:
    """Cancel a queued job and drop what it would have needed; raises JOB_RUNNING or JOB_FINAL."""
    job = services.ledger.cancel(job_id)
    if job.payload is not None:
        services.store.delete(job.payload.id)
    group = services.ledger.groups.get(job.identifier)
    if group is not None and group.placement_job == job_id and group.state == "placing":
        services.ledger.groups.mark_destroyed(job.identifier, group.epoch)
    return services.ledger.require_job(job_id)


def _checked_identifier(identifier: Any) -> str:
    if identifier is None:
        raise ServiceError("IDENTIFIER_REQUIRED", "name the new group: ?identifier=student")
    if not isinstance(identifier, str) or not names.valid_identifier(identifier):
        raise ServiceError(
            "INVALID_ARGUMENT",
            f"identifier must match {names.IDENTIFIER_PATTERN}",
            key="identifier",
        )
    return identifier


def _with_model_paths(
    settings: dict[str, Any], roots: Roots
) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings with absolute model paths, and what the relative ones among them mean."""
    given = {
        "actor.model.path": settings["model"]["path"],
        "actor.ref.model.path": settings["ref"]["model"]["path"],
    }
    paths = {
        key: roots.model(path, key) if path is not None else None for key, path in given.items()
    }
    meant = {
        key: path
        for key, path in paths.items()
        if path is not None and not given[key].startswith("/")
    }
    model = {**settings["model"], "path": paths["actor.model.path"]}
    reference = {**settings["ref"]["model"], "path": paths["actor.ref.model.path"]}
    return {**settings, "model": model, "ref": {**settings["ref"], "model": reference}}, meant


def _existing(
    services: Services, group: GroupRecord, wanted: Wanted
) -> tuple[GroupRecord, JobRecord | None, bool]:
    ledger = services.ledger
    about = {"identifier": group.identifier}
    differing = wanted.differs(group)
    if differing:
        raise ServiceError(
            "GROUP_EXISTS",
            (
                f"group {group.identifier!r} exists with other settings ({', '.join(differing)}); "
                "destroy it first"
            ),
            keys=differing,
            **about,
        )
    if group.state == "down":
        raise is_down(group)
    if group.state == "placing" and not ledger.agents.heard():
        raise without_agent(services, **about)
    job = ledger.job(group.placement_job) if group.placement_job else None
    if group.state in ("placing", "starting") and (job is None or job.final):
        raise ServiceError(
            "GROUP_DOWN", f"group {group.identifier!r} is being started; try again shortly", **about
        )
    return group, job, True


def _place(
    ledger: Ledger, wanted: Wanted, key: str | None, mark: str, waits_for: str | None
) -> tuple[GroupRecord, JobRecord, bool]:
    job = JobRecord(
        id=names.new_job_id(),
        operation=INITIALIZE,
        identifier=wanted.identifier,
        queue=names.AGENT_QUEUE,
        params={"role": wanted.role, "world_size": wanted.world_size, **wanted.said},
        ignored=wanted.ignored,
        key=key,
        fingerprint=mark,
        waits_for=waits_for,
        created_at=time.time(),
    )
    recorded, replayed = ledger.submit(job, check=_refuse_living, group=_record(wanted, job.id))
    log_accepted(recorded, replayed)
    return _group_of(ledger, wanted, recorded.id), recorded, False


def _refuse_living(group: GroupRecord | None) -> None:
    if group is not None and group.state != "destroyed":
        raise _Appeared


def _record(wanted: Wanted, job_id: str) -> GroupRecord:
    return GroupRecord(
        identifier=wanted.identifier,
        role=wanted.role,
        world_size=wanted.world_size,
        config=wanted.settings,
        ignored=wanted.ignored,
        placement_job=job_id,
        created_at=time.time(),
    )


def _group_of(ledger: Ledger, wanted: Wanted, job_id: str) -> GroupRecord:
    return ledger.groups.get(wanted.identifier) or _record(wanted, job_id)


def _slots_awaited(services: Services, wanted: Wanted) -> str | None:
    """Why the group has to wait, None if it need not; raises NO_SUCH_SLOTS where it would wait for
    ever.

    Raises GROUP_DOWN without any agent, which passes only where gateway and agents have just been
    started together. An agent that is kept for a fixed group (``NEXRL_IDENTIFIER``) takes no other.
    """
    world_size = wanted.world_size
    registered = services.ledger.agents.heard()
    if not registered:
        raise without_agent(services)
    agents = [agent for agent in registered if agent.identifier in (None, wanted.identifier)]
    if not agents:
        fixed = sorted({str(agent.identifier) for agent in registered})
        message = (
            "every worker agent is kept for a fixed group (NEXRL_IDENTIFIER): "
            f"{', '.join(fixed)}; use one of these names"
        )
        raise ServiceError("NO_SUCH_SLOTS", message, key="identifier", identifiers=fixed)
    largest, free = max(agent.slots for agent in agents), max(agent.free for agent in agents)
    if world_size > largest:
        message = f"world_size {world_size} is impossible: the largest agent has {largest} slots"
        raise ServiceError("NO_SUCH_SLOTS", message, key="world_size", slots=largest)
    if world_size > free:
        return f"{world_size} free slots on one agent; at the moment the freest has {free}"
    return None


def _withdrawn(ledger: Ledger, group: GroupRecord) -> bool:
    """Whether the job that would place the group is out of the way, so that no agent starts it any
    more."""
    if group.placement_job is None:
        return True
    try:
        ledger.cancel(group.placement_job)
    except ServiceError as error:
        return error.code != "JOB_RUNNING"
    return True
