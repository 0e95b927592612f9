"""Making and ending groups: the two operations whose job may not run in a group."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

from nexrl_contract import names
from nexrl_contract.config import (
    check_role,
    completed,
    differing_keys,
    parse_config,
)
from nexrl_contract.errors import ServiceError, argument_error
from nexrl_contract.operations import INITIALIZE, InitializeParams
from nexrl_contract.records import GroupRecord, JobRecord
from nexrl_ledger import Fenced, Ledger
from pydantic import ValidationError

from nexrl_gateway.paths import Roots
from nexrl_gateway.services import Services
from nexrl_gateway.strict_json import JSON
from nexrl_gateway.submit import digest, is_down, log_accepted, without_agent

_RACES = 5


@dataclass(frozen=True, slots=True)
class GroupRequest:
    """A validated request for a group; ``settings`` are the effective ``actor`` keys with absolute
    model paths.

    ``paths`` are the folders that relative ones stand for, by key.
    """

    identifier: str
    role: str
    world_size: int
    settings: JSON
    ignored: list[str]
    paths: dict[str, str]

    @property
    def said(self) -> JSON:
        """What the answer says of relative paths."""
        return {"paths": self.paths} if self.paths else {}

    def differs(self, group: GroupRecord) -> list[str]:
        """Names of the settings in which ``group`` is another one."""
        keys = differing_keys(completed(group.config), self.settings, "actor.")
        keys += ["role"] if group.role != self.role else []
        return keys + (["world_size"] if group.world_size != self.world_size else [])

    def record(self, job_id: str) -> GroupRecord:
        """The record of the group that the job places."""
        return GroupRecord(
            identifier=self.identifier,
            role=self.role,
            world_size=self.world_size,
            config=self.settings,
            ignored=self.ignored,
            placement_job=job_id,
            created_at=time.time(),
        )


class _Appeared(Exception):
    """Somebody else made the group in the meantime."""


def read_group_request(document: JSON, identifier: str | None, roots: Roots) -> GroupRequest:
    """Check ``initialize``'s body; raises INVALID_ARGUMENT, INVALID_CONFIG, PATH_REFUSED or
    IDENTIFIER_REQUIRED."""
    try:
        body = InitializeParams.model_validate(document)
    except ValidationError as error:
        raise argument_error(error.errors(), InitializeParams.model_fields) from None
    if body.config_path is not None:
        message = "config_path is read by the client; send its content as config_dict"
        raise ServiceError("INVALID_ARGUMENT", message, key="config_path")
    if body.config_dict is None:
        message = "config_dict is missing; it needs at least actor.model.path"
        raise ServiceError("INVALID_ARGUMENT", message, key="config_dict")
    named = body.config_dict.get("role")
    role = check_role(body.role or named or "actor")
    config = parse_config(body.config_dict, role)
    world_size = body.world_size or config.entry.resource.world_size
    if world_size is None:
        message = "give world_size, or resource.world_size in config_dict"
        raise ServiceError("INVALID_ARGUMENT", message, key="world_size")
    unused = [key for key in ("zmq_base_port", "dispatch_mode") if getattr(body, key) is not None]
    unused += ["role"] if named not in (None, role) else []
    settings, paths = _with_model_paths(config.settings(world_size), roots)
    asked = body.config_dict.get("identifier") if identifier is None else identifier
    return GroupRequest(
        _checked_identifier(asked), role, world_size, settings, [*config.ignored, *unused], paths
    )


def initialize(
    services: Services, asked: GroupRequest, key: str | None
) -> tuple[GroupRecord, JobRecord | None, bool]:
    """The group, the job that places it (None where that is forgotten), and whether the group was
    there already.

    Raises GROUP_EXISTS, GROUP_DOWN, NO_SUCH_SLOTS and what the ledger raises.
    """
    ledger = services.ledger
    content = {"wanted": [asked.role, asked.world_size, asked.settings]}
    same = digest(INITIALIZE, asked.identifier, content, "")
    first = ledger.replay_of(key, same)
    if first is not None:
        return _group_of(ledger, asked, first.id), first, False
    for _ in range(_RACES):
        group = ledger.groups.get(asked.identifier)
        if group is not None and group.state != "destroyed":
            return _existing(services, group, asked)
        waits_for = _slots_awaited(services, asked)
        with contextlib.suppress(_Appeared):  # between the look above and the ledger's transaction
            return _place(ledger, asked, key, same, waits_for)
    raise ServiceError(
        "GROUP_EXISTS",
        f"group {asked.identifier!r} is being made and destroyed by others; try again",
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
    # The job is read after the group: while it has not ended, it means that group and no later one.
    if ledger.require_job(job.id).final:
        return
    if group.state == "placing" and not _withdrawn(ledger, group):
        return
    # Fenced: an agent has started the group since the look; its ranks run the job, still queued.
    with contextlib.suppress(Fenced):
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
        message = f"identifier must match {names.IDENTIFIER_PATTERN}"
        raise ServiceError("INVALID_ARGUMENT", message, key="identifier")
    return identifier


def _with_model_paths(settings: JSON, roots: Roots) -> tuple[JSON, dict[str, str]]:
    """The settings with absolute model paths, and what the relative ones among them mean."""
    relative: dict[str, str] = {}

    def absolute(model: JSON, key: str) -> JSON:
        given = model["path"]
        path = roots.model(given, key) if given is not None else None
        if path is not None and not given.startswith("/"):
            relative[key] = path
        return {**model, "path": path}

    model = absolute(settings["model"], "actor.model.path")
    reference = absolute(settings["ref"]["model"], "actor.ref.model.path")
    return {**settings, "model": model, "ref": {**settings["ref"], "model": reference}}, relative


def _existing(
    services: Services, group: GroupRecord, asked: GroupRequest
) -> tuple[GroupRecord, JobRecord | None, bool]:
    ledger, name = services.ledger, group.identifier
    differing = asked.differs(group)
    if differing:
        settings = ", ".join(differing)
        message = f"group {name!r} exists with other settings ({settings}); destroy it first"
        raise ServiceError("GROUP_EXISTS", message, keys=differing, identifier=name)
    if group.state == "down":
        raise is_down(group)
    if group.state == "placing" and not ledger.agents.heard():
        raise without_agent(services, identifier=name)
    job = ledger.job(group.placement_job) if group.placement_job else None
    if group.state in ("placing", "starting") and (job is None or job.final):
        message = f"group {name!r} is being started; try again shortly"
        raise ServiceError("GROUP_DOWN", message, identifier=name)
    return group, job, True


def _place(
    ledger: Ledger, asked: GroupRequest, key: str | None, same: str, waits_for: str | None
) -> tuple[GroupRecord, JobRecord, bool]:
    job = JobRecord(
        id=names.new_job_id(),
        operation=INITIALIZE,
        identifier=asked.identifier,
        queue=names.AGENT_QUEUE,
        params={"role": asked.role, "world_size": asked.world_size, **asked.said},
        ignored=asked.ignored,
        key=key,
        fingerprint=same,
        waits_for=waits_for,
        created_at=time.time(),
    )
    recorded, replayed = ledger.submit(job, check=_refuse_living, group=asked.record(job.id))
    log_accepted(recorded, replayed)
    return _group_of(ledger, asked, recorded.id), recorded, False


def _refuse_living(group: GroupRecord | None) -> None:
    if group is not None and group.state != "destroyed":
        raise _Appeared


def _group_of(ledger: Ledger, asked: GroupRequest, job_id: str) -> GroupRecord:
    return ledger.groups.get(asked.identifier) or asked.record(job_id)


def _slots_awaited(services: Services, asked: GroupRequest) -> str | None:
    """Why the group has to wait, None if it need not; raises NO_SUCH_SLOTS where it would wait for
    ever.

    Raises GROUP_DOWN without any agent, which passes only where gateway and agents have just been
    started together. An agent that is kept for a fixed group (``NEXRL_IDENTIFIER``) takes no other.
    """
    registered = services.ledger.agents.heard()
    if not registered:
        raise without_agent(services)
    agents = [agent for agent in registered if agent.identifier in (None, asked.identifier)]
    if not agents:
        fixed = sorted({str(agent.identifier) for agent in registered})
        message = (
            "every worker agent is kept for a fixed group (NEXRL_IDENTIFIER): "
            f"{', '.join(fixed)}; use one of these names"
        )
        raise ServiceError("NO_SUCH_SLOTS", message, key="identifier", identifiers=fixed)
    wanted = asked.world_size
    largest, free = max(agent.slots for agent in agents), max(agent.free for agent in agents)
    if wanted > largest:
        message = f"world_size {wanted} is impossible: the largest agent has {largest} slots"
        raise ServiceError("NO_SUCH_SLOTS", message, key="world_size", slots=largest)
    if wanted > free:
        return f"{wanted} free slots on one agent; at the moment the freest has {free}"
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
