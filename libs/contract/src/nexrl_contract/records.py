"""What the ledger stores and the HTTP interface shows: groups, jobs, agents. Frozen; made from and
to flat Redis hashes."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from nexrl_contract.sections import ActorConfig

JobState = Literal["queued", "running", "finished", "failed", "cancelled", "rolled_back"]
GroupState = Literal["placing", "starting", "up", "ready", "down", "destroyed"]
FINAL_STATES: frozenset[str] = frozenset({"finished", "failed", "cancelled", "rolled_back"})


class Record(BaseModel):
    """A flat Redis hash: strings as they are, everything else as JSON; None is an absent field."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    def to_hash(self) -> dict[str, str]:
        """Fields as Redis stores them."""
        return encode_fields(self.model_dump(mode="json"))

    @classmethod
    def from_hash(cls, fields: dict[str, str]) -> Self:
        """Inverse of :meth:`to_hash`."""
        text = {name for name, info in cls.model_fields.items() if _is_text(info.annotation)}
        return cls.model_validate(
            {
                name: value if name in text else json.loads(value)
                for name, value in fields.items()
                if name in cls.model_fields
            }
        )


def encode_fields(fields: dict[str, Any]) -> dict[str, str]:
    """Strings as they are, other values as compact JSON, None left out."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        for name, value in fields.items()
        if value is not None
    }


def _is_text(annotation: Any) -> bool:
    return annotation in (str, str | None, JobState, GroupState)


class PayloadRef(BaseModel):
    """Where a payload lies in the store, its size in bytes, and the checksum that its readers hold
    it against."""

    model_config = ConfigDict(frozen=True)

    id: str
    nbytes: int
    checksum: str | None = None


class JobRecord(Record):
    """One operation: identity, state, and the result or error it ended with. Times are seconds
    since the epoch."""

    id: str
    operation: str
    identifier: str
    queue: str
    state: JobState = "queued"
    order: int = 0
    params: dict[str, Any] = {}
    payload: PayloadRef | None = None
    rows: int | None = None
    ignored: list[str] = []
    key: str | None = None
    fingerprint: str = ""
    waits_for: str | None = None
    attempt: int = 0
    epoch: int | None = None
    seq: int | None = None
    created_at: float = 0.0
    started_at: float | None = None
    finished_at: float | None = None
    result: dict[str, Any] | None = None
    result_payload: PayloadRef | None = None
    error: dict[str, Any] | None = None

    @property
    def final(self) -> bool:
        """Whether the job has ended."""
        return self.state in FINAL_STATES


class Share(BaseModel):
    """The ranks of a group that one agent holds, on its host."""

    model_config = ConfigDict(frozen=True)

    agent: str
    slots: int
    host: str = ""


class GroupRecord(Record):
    """One worker group. ``epoch`` counts its incarnations; ``seq`` the mutating operations its
    weights contain.

    ``placement`` has one share for each agent that holds ranks of it; the first one's agent leads.
    """

    identifier: str
    state: GroupState = "placing"
    role: str = "actor"
    world_size: int = 1
    config: dict[str, Any] = {}
    ignored: list[str] = []
    placement_job: str | None = None
    placement: tuple[Share, ...] = ()
    epoch: int = 0
    seq: int = 0
    initialised: bool = False
    heartbeat: float | None = None
    running_job: str | None = None
    cause: str | None = None
    info: dict[str, Any] = {}
    created_at: float = 0.0

    @classmethod
    def from_hash(cls, fields: dict[str, str]) -> Self:
        """Of 0.1.0's first form, too: its one agent stood under ``agent`` and ``nodes``."""
        if "placement" not in fields and (agent := fields.get("agent")):
            host = next(iter(json.loads(fields.get("nodes", "[]"))), "")
            share = {"agent": agent, "slots": int(fields["world_size"]), "host": host}
            fields = {**fields, "placement": json.dumps([share])}
        return super().from_hash(fields)

    @property
    def leader(self) -> str | None:
        """The agent that leads the present incarnation; None before the first."""
        return self.placement[0].agent if self.placement else None

    def unheard(self, heard: Collection[str]) -> list[str]:
        """The agents of its placement that are not among those ``heard``."""
        return [share.agent for share in self.placement if share.agent not in heard]

    @property
    def actor(self) -> ActorConfig | None:
        """Its configuration; None for that of a version that had other keys."""
        try:
            return ActorConfig.model_validate(self.config)
        except ValidationError:
            return None


class LatestCheckpoint(BaseModel):
    """The newest published checkpoint of one group and kind.

    ``group_created_at`` tells the group from a later one of that name. ``order`` is the save's.
    """

    path: str
    step: int
    job_id: str
    group_created_at: float
    order: int = 0


class ProcessRecord(Record):
    """One agent or checkpointer: its slots (total and free), the group that an agent is kept for
    (if any), and the time it was last heard. A checkpointer has one slot."""

    name: str
    host: str = ""
    device: str = "cpu"
    slots: int = 0
    free: int = 0
    identifier: str | None = None
    pid: int = 0
    heartbeat: float = 0.0
