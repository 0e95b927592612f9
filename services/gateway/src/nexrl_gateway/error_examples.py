"""The errors that the OpenAPI page shows; a test compares them with what a real gateway answers."""

from __future__ import annotations

from typing import Any

from nexrl_contract.errors import ServiceError
from nexrl_contract.names import FRAME_TYPE

from nexrl_gateway.answer_examples import JOB_ID

_SHOWN = (
    ServiceError(
        "MALFORMED", "the body is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"
    ),
    ServiceError("IDENTIFIER_REQUIRED", "name one of the groups: ?identifier=student or teacher"),
    ServiceError(
        "GROUP_NOT_FOUND", "there is no worker group 'studnet'; initialize_worker makes one", identifier="studnet"
    ),
    ServiceError("JOB_NOT_FOUND", f"there is no job {JOB_ID}", job_id=JOB_ID),
    ServiceError("GROUP_NOT_READY", "group 'student' has no model yet; call init_model first", identifier="student"),
    ServiceError(
        "GROUP_EXISTS",
        "group 'student' exists with other settings (actor.optim.lr); destroy it first",
        keys=["actor.optim.lr"],
        identifier="student",
    ),
    ServiceError(
        "IDEMPOTENCY_MISMATCH",
        "idempotency key 'step-17-try' was used for other content; use a new key for a new request",
        job_id=JOB_ID,
    ),
    ServiceError(
        "JOB_RUNNING",
        f"job {JOB_ID} is queued; ask again, or with ?wait=30",
        waits_for="the consumer of train:student",
        job_id=JOB_ID,
        identifier="student",
    ),
    ServiceError(
        "EXPIRED", f"job {JOB_ID} ended more than a day or very many jobs ago, and its result is gone", job_id=JOB_ID
    ),
    ServiceError(
        "TOO_LARGE",
        "the body has 40000000 bytes or more and the limit is 33554432; send tensors as the binary frame "
        f"({FRAME_TYPE}) instead, as nexrl_client does",
        limit=33554432,
    ),
    ServiceError(
        "UNSUPPORTED_TYPE", f"Content-Type 'text/plain' is not known here; send application/json or {FRAME_TYPE}"
    ),
    ServiceError(
        "INVALID_TENSOR",
        "old_log_probs has shape [2, 3]; expected [2,4] or [2,2]",
        tensor="old_log_probs",
        expected="[2,4] or [2,2]",
        actual="[2, 3]",
    ),
    ServiceError(
        "INVALID_CONFIG",
        "unknown config key actor.lr; did you mean actor.optim.lr?",
        key="actor.lr",
        nearest="actor.optim.lr",
    ),
    ServiceError(
        "INVALID_ARGUMENT",
        "unknown argument 'gradclip'; did you mean grad_clip?",
        key="gradclip",
        nearest="grad_clip",
    ),
    ServiceError("TOO_MANY_QUEUED", "64 operations wait for 'student' already; try later"),
    ServiceError("OPERATION_FAILED", "RuntimeError: out of memory", rank=1, job_id=JOB_ID, identifier="student"),
    ServiceError(
        "GROUP_DOWN",
        "group 'student' is down: rank 1 was killed; destroy and initialize it",
        retryable=False,
        identifier="student",
        cause="rank 1 was killed",
    ),
    ServiceError("REDIS_UNAVAILABLE", "Redis does not answer; try again shortly"),
    ServiceError(
        "WAIT_LIMIT",
        f"job {JOB_ID} is queued; the gateway waits no longer, the job goes on: GET /jobs/{JOB_ID}/result",
        job_id=JOB_ID,
        identifier="student",
    ),
    ServiceError("NO_SPACE", "the payload store's disk is full: free space in its folder, or send the batch later"),
)
ERROR_EXAMPLES: dict[str, dict[str, Any]] = {error.code: {"error": error.body()} for error in _SHOWN}
"""Whole bodies by code: at least one for every status that a route declares."""
