"""From a request to a job in the ledger: resolve the group, check the content, store the batch,
submit once."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import xxhash
from anyio.to_thread import run_sync
from fastapi import Request
from nexrl_contract import names
from nexrl_contract.batch import CheckedBatch, check_batch, check_params, shortened, unread_metadata
from nexrl_contract.envelope import Envelope
from nexrl_contract.errors import ServiceError
from nexrl_contract.operations import Operation
from nexrl_contract.records import GroupRecord, JobRecord, PayloadRef
from nexrl_ledger import Ledger
from tensor_codec import Header

from nexrl_gateway import intake
from nexrl_gateway.admission import admit, named_identifier, resolve
from nexrl_gateway.bodies import (
    BATCH_KEYS,
    BatchDocument,
    PartsDocument,
    content_kind,
    json_body,
    read_batch,
)
from nexrl_gateway.paths import settle
from nexrl_gateway.services import Services

_MOST_PARAMS = 100
"""More than any operation has: among so many one is unknown, and one is enough to refuse."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Draft:
    """A checked request that is not in the ledger yet; ``fingerprint`` is the same for the same
    request."""

    job_id: str
    fingerprint: str
    params: dict[str, Any]
    payload: PayloadRef | None = None
    rows: int | None = None
    ignored: list[str] = field(default_factory=list)
    stored_here: bool = False
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

    The group is resolved and asked before the body is read, where the query names it.
    """
    kind = content_kind(request, frames=operation.takes_batch)
    entrance = partial(_entrance, services.ledger, operation, key)
    if kind == names.FRAME_TYPE:
        group = await run_sync(entrance, identifier)
        draft = await _frame_draft(services, operation, request, group)
    else:
        early = await run_sync(entrance, identifier) if identifier is not None else None
        async with json_body(request, tensors=operation.takes_batch) as document:
            named = named_identifier(identifier, document)
            group = early if early is not None else await run_sync(entrance, named)
            if not operation.takes_batch:
                draft = await run_sync(_plain_draft, services, operation, document, group)
            else:
                batch = read_batch(document)
                if isinstance(batch, PartsDocument):
                    return await run_sync(_submit_parts, services, operation, batch, group, key)
                draft = await run_sync(_json_draft, services, operation, batch, group)
    return await run_sync(submit_draft, services, operation, group, draft, key)


def submit_draft(
    services: Services, operation: Operation, group: GroupRecord, draft: Draft, key: str | None
) -> JobRecord:
    """Write the job; a draft that is refused or was here before leaves no payload behind."""
    job = JobRecord(
        id=draft.job_id,
        operation=operation.name,
        identifier=group.identifier,
        queue=names.train_queue(group.identifier),
        params=draft.params,
        payload=draft.payload,
        rows=draft.rows,
        ignored=draft.ignored,
        key=key,
        fingerprint=draft.fingerprint,
        created_at=time.time(),
    )
    try:
        recorded, replayed = services.ledger.submit(job, check=partial(admit, operation=operation))
    except (
        ServiceError
    ):  # and no other: where Redis went away the job may be written, and its payload needed
        _discard(services, draft)
        raise
    if replayed:
        _discard(services, draft)
    log_accepted(recorded, replayed)
    return recorded


def _discard(services: Services, draft: Draft) -> None:
    if draft.stored_here and draft.payload is not None:
        services.store.delete(draft.payload.id)


def log_accepted(job: JobRecord, replayed: bool) -> None:
    """The one line of a request that became, or was, a job."""
    nbytes = job.payload.nbytes if job.payload else 0
    event = "job.replayed" if replayed else "job.accepted"
    _log.info(
        "%s job_id=%s operation=%s identifier=%s nbytes=%d",
        event,
        job.id,
        job.operation,
        job.identifier,
        nbytes,
    )


def fingerprint(operation: str, identifier: str, params: Mapping[str, Any], content: str) -> str:
    """xxh3-128 over everything that makes two requests the same."""
    text = json.dumps(
        [operation, identifier, params, content], sort_keys=True, separators=(",", ":")
    )
    return str(xxhash.xxh3_128_hexdigest(text.encode()))


def _params(operation: Operation, given: dict[str, Any]) -> dict[str, Any]:
    """The operation's arguments with defaults; raises INVALID_ARGUMENT."""
    return check_params(
        operation,
        dict(islice(given.items(), _MOST_PARAMS)),
        BATCH_KEYS if operation.takes_batch else (),
    )


def _entrance(
    ledger: Ledger, operation: Operation, key: str | None, identifier: str | None
) -> GroupRecord:
    """The group, if it can take the operation now; a repeated key is answered whatever has become
    of the group."""
    group = resolve(ledger, identifier)
    if key is None or not ledger.knows_key(key):
        admit(group, operation)
    return group


async def _frame_draft(
    services: Services, operation: Operation, request: Request, group: GroupRecord
) -> Draft:
    job_id = names.new_job_id()

    def check(header: Header) -> tuple[Envelope, dict[str, Any], CheckedBatch]:
        envelope = intake.envelope_of(header)
        params = _params(operation, envelope.params)
        return envelope, params, check_batch(header.tensors, operation, params, group.actor)

    limit = services.settings.max_body_bytes
    (envelope, params, checked), ref = await intake.store_frame(
        request, services, job_id, limit, check
    )
    mark = fingerprint(operation.name, group.identifier, params, ref.checksum)
    payload = PayloadRef(id=ref.id, nbytes=ref.nbytes, checksum=ref.checksum)
    ignored = _ignored(operation, checked, envelope.metadata)
    return Draft(job_id, mark, params, payload, checked.rows, ignored, stored_here=True)


def _json_draft(
    services: Services, operation: Operation, batch: BatchDocument, group: GroupRecord
) -> Draft:
    params = _params(operation, batch.params)
    read = {name: entry for name, entry in batch.tensors.items() if name in operation.reads}
    tensors = intake.decode_tensors(read)
    checked = check_batch(tensors, operation, params, group.actor)
    ignored = _ignored(
        operation, checked, batch.metadata, [*(batch.tensors.keys() - read.keys()), *batch.values]
    )
    job_id = names.new_job_id()
    ref = intake.store_tensors(
        services.store, job_id, tensors, Envelope(batch.metadata, batch.params)
    )
    mark = fingerprint(operation.name, group.identifier, params, ref.checksum)
    payload = PayloadRef(id=ref.id, nbytes=ref.nbytes, checksum=ref.checksum)
    return Draft(job_id, mark, params, payload, checked.rows, ignored, stored_here=True)


def _ignored(
    operation: Operation,
    checked: CheckedBatch,
    metadata: Mapping[str, Any],
    dropped: Iterable[str] = (),
) -> list[str]:
    """What of a batch does nothing; ``dropped`` was in the request and is in no frame."""
    return shortened([*checked.ignored, *unread_metadata(operation.name, metadata), *dropped])


def _plain_draft(
    services: Services, operation: Operation, document: dict[str, Any], group: GroupRecord
) -> Draft:
    params = settle(_params(operation, document), services.roots)
    return Draft(
        names.new_job_id(), fingerprint(operation.name, group.identifier, params, ""), params
    )


def _submit_parts(
    services: Services,
    operation: Operation,
    batch: PartsDocument,
    group: GroupRecord,
    key: str | None,
) -> JobRecord:
    """The parts stay until a job has taken them, so the verb may be repeated; the id stands for
    their content."""
    said = {"params": batch.params, "metadata": batch.metadata}
    mark = fingerprint(
        operation.name, group.identifier, said, f"parts:{batch.payload}:{batch.parts}"
    )
    first = services.ledger.replay_of(key, mark)
    if first is not None:
        return first
    try:
        draft = _parts_draft(services, operation, batch, group, mark)
    except ServiceError:
        first = services.ledger.replay_of(key, mark)
        if first is None:
            raise
        return first  # an earlier attempt, whose connection was lost, has taken the parts meanwhile
    job = submit_draft(services, operation, group, draft, key)
    if draft.stored_here:
        with contextlib.suppress(
            ServiceError
        ):  # the job is there all the same, and the janitor takes them later
            services.store.delete(batch.payload)
    return job


def _parts_draft(
    services: Services, operation: Operation, batch: PartsDocument, group: GroupRecord, mark: str
) -> Draft:
    """What the verb says wins over the frame; metadata that the frame lacks makes a copy, as the
    ranks read it there."""
    ref = services.store.assemble(batch.payload, batch.parts)
    with services.store.open(batch.payload, ref.checksum) as payload:
        header = payload.header
    envelope = intake.envelope_of(header)
    params = _params(operation, {**envelope.params, **batch.params})
    metadata = {**envelope.metadata, **batch.metadata}
    checked = check_batch(header.tensors, operation, params, group.actor)
    ignored = _ignored(operation, checked, metadata, batch.values)
    job_id, copied = names.new_job_id(), metadata != envelope.metadata
    if copied:
        frame_metadata = {**header.metadata, **Envelope(metadata, envelope.params).frame_metadata()}
        ref = intake.store_with_metadata(services.store, ref, job_id, frame_metadata)
    payload_ref = PayloadRef(id=ref.id, nbytes=ref.nbytes, checksum=ref.checksum)
    return Draft(job_id, mark, params, payload_ref, checked.rows, ignored, stored_here=copied)
