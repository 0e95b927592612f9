"""From a request to a job in the ledger: find the group, validate the content, store the batch,
submit once."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Self

import xxhash
from anyio.to_thread import run_sync
from fastapi import Request
from nexrl_contract import names
from nexrl_contract.batch import check_batch, check_params, shortened, unread_metadata
from nexrl_contract.envelope import Envelope
from nexrl_contract.errors import ServiceError
from nexrl_contract.operations import DESTROY, Operation
from nexrl_contract.records import GroupRecord, JobRecord, PayloadRef
from nexrl_contract.tensors import Described
from nexrl_ledger import Ledger
from nexrl_payloads import StoredPayload
from tensor_codec import Header, encode

from nexrl_gateway import uploads
from nexrl_gateway.bodies import (
    BATCH_KEYS,
    BatchDocument,
    PartsDocument,
    content_kind,
    json_body,
    read_batch,
)
from nexrl_gateway.paths import resolve_paths
from nexrl_gateway.services import Services
from nexrl_gateway.strict_json import JSON

_START_S = 10.0
"""A gateway younger than that may be there before the agents of its stack."""
_MOST_PARAMS = 100
"""More than any operation has: among so many one is unknown, and one is enough to refuse."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Validated:
    """A request's arguments with defaults, its batch's rows, and what of it does nothing."""

    params: JSON
    rows: int | None = None
    ignored: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PendingJob:
    """A validated request that is not in the ledger yet; the same request has the same
    ``digest``."""

    job_id: str
    digest: str
    request: Validated
    stored: StoredPayload | None = None
    own_payload: bool = False
    """The payload was made by this request, so a request that comes to nothing takes it away
    again."""


async def submit_operation(
    services: Services,
    operation: Operation,
    request: Request,
    identifier: str | None,
    key: str | None,
) -> JobRecord:
    """The job of this request, or the first one of its key; raises ServiceError for whatever is
    refused.

    The group is found and asked before the body is read, where the query names it. It may change
    while the body comes, so the ledger's transaction asks it again.
    """
    kind = content_kind(request, frames=operation.takes_batch)
    admitted = partial(_Submission.admitted, services, operation, key)
    if kind == names.FRAME_TYPE:
        submission = await run_sync(admitted, identifier)
        return await run_sync(submission.submit, await submission.from_frame(request))
    early = await run_sync(admitted, identifier) if identifier is not None else None
    async with json_body(request, tensors=operation.takes_batch) as document:
        named = named_identifier(identifier, document)
        submission = early if early is not None else await run_sync(admitted, named)
        if not operation.takes_batch:
            pending = await run_sync(submission.from_arguments, document)
        elif isinstance(batch := read_batch(document), PartsDocument):
            return await run_sync(submission.submit_parts, batch)
        else:
            pending = await run_sync(submission.from_json, batch)
    return await run_sync(submission.submit, pending)


@dataclass(frozen=True, slots=True)
class _Submission:
    """A request for an operation of a group that can take it. Each form of a request is validated,
    then what was not stored before is stored, then one job is written."""

    services: Services
    operation: Operation
    key: str | None
    group: GroupRecord

    @classmethod
    def admitted(
        cls, services: Services, operation: Operation, key: str | None, identifier: str | None
    ) -> Self:
        """Raises as :func:`find_group` and :func:`admit` do; a repeated key is answered whatever
        has become of the group."""
        group = find_group(services.ledger, identifier)
        if key is None or not services.ledger.knows_key(key):
            admit(group, operation)
        return cls(services, operation, key, group)

    async def from_frame(self, request: Request) -> PendingJob:
        """A batch that is the body; it is streamed into the store."""

        def check(header: Header) -> Validated:
            envelope = uploads.envelope_of(header)
            params = self._params(envelope.params)
            return self._validated(params, header.tensors, envelope.metadata)

        job_id, limit = names.new_job_id(), self.services.settings.max_body_bytes
        validated, ref = await uploads.store_frame(request, self.services, job_id, limit, check)
        same = self._digest(validated.params, ref.checksum)
        return PendingJob(job_id, same, validated, ref, own_payload=True)

    def from_json(self, batch: BatchDocument) -> PendingJob:
        """A batch as base64; tensors that the operation does not know are not stored."""
        params = self._params(batch.params)
        read = {name: each for name, each in batch.tensors.items() if name in self.operation.reads}
        tensors = uploads.decode_tensors(read)
        dropped = [*(batch.tensors.keys() - read.keys()), *batch.values]
        validated = self._validated(params, tensors, batch.metadata, dropped)
        job_id, envelope = names.new_job_id(), Envelope(batch.metadata, batch.params)
        ref = self.services.store.put(job_id, encode(tensors, envelope.frame_metadata()))
        return PendingJob(
            job_id, self._digest(params, ref.checksum), validated, ref, own_payload=True
        )

    def from_arguments(self, document: JSON) -> PendingJob:
        """An operation without a batch."""
        params = resolve_paths(self._params(document), self.services.roots)
        return PendingJob(names.new_job_id(), self._digest(params, ""), Validated(params))

    def submit_parts(self, batch: PartsDocument) -> JobRecord:
        """A batch that was uploaded before. The parts stay until a job has taken them, so the verb
        may be repeated; the id stands for their content."""
        said = {"params": batch.params, "metadata": batch.metadata}
        same = self._digest(said, f"parts:{batch.payload}:{batch.parts}")
        if (first := self.services.ledger.replay_of(self.key, same)) is not None:
            return first
        try:
            pending = self._from_parts(batch, same)
        except ServiceError:
            # An earlier attempt, whose connection was lost, may have taken the parts meanwhile.
            if (first := self.services.ledger.replay_of(self.key, same)) is not None:
                return first
            raise
        job = self.submit(pending)
        if pending.own_payload:
            self.services.store.discard(batch.payload)
        return job

    def _from_parts(self, batch: PartsDocument, same: str) -> PendingJob:
        """What the verb says wins over the frame; metadata that the frame lacks makes a copy, as
        the ranks read it there."""
        store = self.services.store
        ref = store.assemble(batch.payload, batch.parts)
        with store.open(batch.payload, ref.checksum) as payload:
            header = payload.header
        envelope = uploads.envelope_of(header)
        params = self._params({**envelope.params, **batch.params})
        metadata = {**envelope.metadata, **batch.metadata}
        validated = self._validated(params, header.tensors, metadata, batch.values)
        job_id, copied = names.new_job_id(), metadata != envelope.metadata
        if copied:
            merged = {**header.metadata, **Envelope(metadata, envelope.params).frame_metadata()}
            ref = uploads.store_with_metadata(store, ref, job_id, merged)
        return PendingJob(job_id, same, validated, ref, own_payload=copied)

    def _params(self, given: JSON) -> JSON:
        """The operation's arguments with defaults; raises INVALID_ARGUMENT."""
        beside = BATCH_KEYS if self.operation.takes_batch else ()
        return check_params(self.operation, dict(islice(given.items(), _MOST_PARAMS)), beside)

    def _validated(
        self,
        params: JSON,
        tensors: Mapping[str, Described],
        metadata: Mapping[str, Any],
        dropped: Iterable[str] = (),
    ) -> Validated:
        """Check a batch by its header; ``dropped`` was in the request and is in no frame. Raises
        INVALID_TENSOR."""
        checked = check_batch(tensors, self.operation, params, self.group.actor)
        unread = unread_metadata(self.operation.name, metadata)
        return Validated(params, checked.rows, shortened([*checked.ignored, *unread, *dropped]))

    def _digest(self, params: Mapping[str, Any], content: str) -> str:
        return digest(self.operation.name, self.group.identifier, params, content)

    def submit(self, pending: PendingJob) -> JobRecord:
        """Write the job; one that is refused or was here before leaves no payload behind."""
        ref = pending.stored
        job = JobRecord(
            id=pending.job_id,
            operation=self.operation.name,
            identifier=self.group.identifier,
            queue=names.train_queue(self.group.identifier),
            params=pending.request.params,
            payload=PayloadRef(id=ref.id, nbytes=ref.nbytes, checksum=ref.checksum)
            if ref
            else None,
            rows=pending.request.rows,
            ignored=pending.request.ignored,
            key=self.key,
            fingerprint=pending.digest,
            created_at=time.time(),
        )
        try:
            check = partial(admit, operation=self.operation)
            recorded, replayed = self.services.ledger.submit(job, check=check)
        except ServiceError:
            # And no other: where Redis went away between the write and its reply, the job may be
            # there and need its payload.
            self._discard(pending)
            raise
        if replayed:
            self._discard(pending)
        log_accepted(recorded, replayed)
        return recorded

    def _discard(self, pending: PendingJob) -> None:
        if pending.own_payload and pending.stored is not None:
            self.services.store.delete(pending.stored.id)


def log_accepted(job: JobRecord, replayed: bool) -> None:
    """The one line of a request that became, or was, a job."""
    _log.info(
        "%s job_id=%s operation=%s identifier=%s nbytes=%d",
        "job.replayed" if replayed else "job.accepted",
        job.id,
        job.operation,
        job.identifier,
        job.payload.nbytes if job.payload else 0,
    )


def digest(operation: str, identifier: str, params: Mapping[str, Any], content: str) -> str:
    """xxh3-128 over everything that makes two requests the same."""
    text = json.dumps(
        [operation, identifier, params, content], sort_keys=True, separators=(",", ":")
    )
    return str(xxhash.xxh3_128_hexdigest(text.encode()))


def named_identifier(query: str | None, document: JSON) -> str | None:
    """The identifier of the query, else of the body, which loses it; raises INVALID_ARGUMENT where
    they differ."""
    inner = document.pop("identifier", None)
    if inner is not None and not isinstance(inner, str):
        raise ServiceError("INVALID_ARGUMENT", "identifier must be text", key="identifier")
    if query is not None and inner is not None and query != inner:
        message = "identifier in the query and in the body differ; send one"
        raise ServiceError("INVALID_ARGUMENT", message, key="identifier")
    return query if query is not None else inner


def find_group(ledger: Ledger, identifier: str | None) -> GroupRecord:
    """The group of that name, or the only living one for None; raises GROUP_NOT_FOUND or
    IDENTIFIER_REQUIRED."""
    if identifier is None:
        identifier = _only(ledger.groups.identifiers())
    group = ledger.groups.get(identifier) if names.valid_identifier(identifier) else None
    if group is None:
        shown = identifier[:100]
        message = f"there is no worker group {shown!a}; initialize_worker makes one"
        raise ServiceError("GROUP_NOT_FOUND", message, identifier=shown)
    return group


def admit(group: GroupRecord | None, operation: Operation) -> None:
    """Raise unless the group can take the operation now; also the check of the ledger's
    transaction, where the group may be gone."""
    if group is None:
        message = "the group has just been destroyed; initialize_worker makes it anew"
        raise ServiceError("GROUP_NOT_READY", message)
    name, code = group.identifier, "GROUP_NOT_READY"
    if group.state == "destroyed":
        message = f"group {name!r} was destroyed; initialize_worker makes it anew"
    elif operation.name == DESTROY:
        return
    elif group.state == "down":
        raise is_down(group)
    elif group.state in ("placing", "starting") and group.initialised:
        code, message = "GROUP_DOWN", f"group {name!r} is being restarted; try again shortly"
    elif group.state in ("placing", "starting"):
        message = f"group {name!r} is {group.state}; wait for initialize_worker to end"
    elif group.role not in operation.roles:
        code, roles = "ROLE_UNSUPPORTED", ", ".join(operation.roles)
        message = f"{operation.name} is for {roles} groups; the role of {name!r} is {group.role}"
    elif operation.needs_model and group.state != "ready":
        message = f"group {name!r} has no model yet; call init_model first"
    else:
        return
    raise ServiceError(code, message, identifier=name, cause=group.cause)


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
    message = (
        "no worker agent is alive; start one (`nexrl up` and Compose start one with the rest, else "
        "`python -m nexrl_worker.agent`) and call initialize_worker again"
    )
    young = time.time() - services.started_at < _START_S
    return ServiceError("GROUP_DOWN", message, retryable=young, **about)


def _only(living: list[str]) -> str:
    if not living:
        message = "there is no worker group yet; initialize_worker makes one"
        raise ServiceError("GROUP_NOT_FOUND", message)
    if len(living) > 1:
        message = f"name one of the groups: ?identifier={' or '.join(living[:10])}"
        raise ServiceError("IDENTIFIER_REQUIRED", message)
    return living[0]
