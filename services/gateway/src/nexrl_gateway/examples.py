"""What the OpenAPI page shows: requests, answers, errors. Tests send the requests to a real gateway
and compare the answers' keys."""

from __future__ import annotations

import struct
from typing import Any

from nexrl_contract.batch import answers_of, reads_of
from nexrl_contract.errors import ServiceError
from nexrl_contract.names import FRAME_TYPE, JSON_TYPE
from nexrl_contract.operations import INITIALIZE, OPERATIONS, SCORED, Operation
from nexrl_contract.sections import ActorConfig
from tensor_codec import RawTensor, to_json

B, S, R = 2, 4, 2
PATH = "/models/tiny"

GROUP: dict[str, Any] = {
    "config_dict": {"actor": {"model": {"path": PATH}, "optim": {"lr": 1e-3}}},
    "role": "actor",
    "world_size": 2,
}
PARTS: dict[str, Any] = {"payload": "0123456789abcdef0123456789abcdef", "parts": 3}


def _integers(*values: int, width: int) -> Any:
    return to_json(
        RawTensor("I64", (len(values) // width, width), struct.pack(f"<{len(values)}q", *values))
    )


def floats(*values: float, width: int | None = None) -> Any:
    """A JSON tensor of float32 numbers, ``[len(values)]`` or, with a width, ``[len(values) //
    width, width]``."""
    shape = (len(values),) if width is None else (len(values) // width, width)
    return to_json(RawTensor("F32", shape, struct.pack(f"<{len(values)}f", *values)))


TENSORS: dict[str, Any] = {
    "input_ids": _integers(5, 6, 7, 8, 5, 6, 9, 8, width=S),
    "attention_mask": _integers(*[1] * B * S, width=S),
    "responses": _integers(7, 8, 9, 8, width=R),
    "advantages": floats(0.5, 0.5, -0.5, -0.5, width=R),
    "old_log_probs": floats(-1.0, -1.2, -0.9, -1.1, width=R),
    "ref_log_prob": floats(-1.1, -1.2, -1.0, -1.1, width=R),
    "teacher_log_probs": floats(-0.8, -1.0, -1.5, -1.0, width=R),
    "values": floats(0.1, 0.2, 0.1, 0.3, width=R),
    "returns": floats(1.0, 1.0, 0.0, 0.0, width=R),
    "rewards": floats(0.7, -0.2),
}
"""Of two rows of four tokens, the last two being the response."""
_DEFAULT = ActorConfig.model_validate({"model": {"path": PATH}})


def batch_example(operation: Operation) -> dict[str, Any]:
    """What the operation reads in a group of the default configuration."""
    loss = reads_of(operation, {}, _DEFAULT, TENSORS)
    read = {*SCORED, *loss.required, *loss.optional}
    tensors = {name: TENSORS[name] for name in operation.reads if name in TENSORS and name in read}
    return {"tensors": tensors, "metadata": {"temperature": 1.0}}


def request_body(operation: Operation) -> dict[str, Any]:
    """OpenAPI's description of what the operation takes."""
    schema = operation.params.model_json_schema()
    if not operation.takes_batch:
        example = {
            name: info.examples[0]
            for name, info in operation.params.model_fields.items()
            if info.examples
        }
        return {
            "content": {JSON_TYPE: {"schema": schema, "examples": {"typical": {"value": example}}}}
        }
    schema = {**schema, "additionalProperties": True}
    examples = {
        "tensors": {"summary": "Tensors as base64", "value": batch_example(operation)},
        "parts": {"summary": "After PUT /payloads/{payload}/parts/0, 1, 2", "value": PARTS},
    }
    frame = {
        "schema": {
            "type": "string",
            "format": "binary",
            "description": "A safetensors file; see libs/tensor_codec/SPEC.md",
        }
    }
    return {
        "required": True,
        "content": {JSON_TYPE: {"schema": schema, "examples": examples}, FRAME_TYPE: frame},
    }


JOB_ID = "019a0c3f5d207c1f8e2a4b6d8f0a1c3e"
_AT = 1767225600.0
_FINGERPRINT = "dcdffb064cbb6937"
_GROUP = "student"
_DONE = {"status": "success", "identifier": _GROUP, "job_id": JOB_ID}

_LEARNED: dict[str, Any] = {
    "actor/loss": 0.71,
    "actor/tokens": 4.0,
    "actor/rows": 2.0,
    "actor/pg_loss": 0.71,
    "actor/entropy_loss": 4.15,
    "actor/ratio_mean": 1.0,
    "actor/ppo_kl": 0.0,
    "time/forward_s": 0.04,
    "time/backward_s": 0.04,
    "memory/peak_mib": 379.1,
}
_STEPPED: dict[str, Any] = {
    "actor/grad_norm": 1.7,
    "actor/lr": 0.001,
    "step_applied": True,
    "time/step_s": 0.004,
}
_CRITICISED: dict[str, Any] = {
    "critic/loss": 0.2,
    "critic/vf_loss": 0.2,
    "critic/values_mean": 0.4,
    "step_applied": True,
}
_VERSION: dict[str, Any] = {"weight_version": 1, "fingerprint": _FINGERPRINT}
_MODEL: dict[str, Any] = {
    "role": "actor",
    "model_type": "qwen2",
    "parameters": 20768,
    "vocab_size": 64,
    "max_position_embeddings": 32768,
    "dtype": "float32",
    "compute_dtype": "float32",
    "reduce_dtype": "float32",
    "device": "cpu",
    "world_size": 2,
    "chunked_log_probs": True,
    "chunked_log_probs_reason": None,
    "packing": False,
    "packing_reason": None,
    "micro_batch_mib": 4096.0,
    "optimizer_steps": 0,
    "weight_version": 0,
}


def _result(operation: str, metrics: dict[str, Any], **said: Any) -> dict[str, Any]:
    """What an operation on a batch answers in a group of the default configuration."""
    about = {"job_id": JOB_ID, "identifier": _GROUP, "operation": operation, "ignored": []}
    timing = {"queued_s": 0.005, "run_s": 0.15, "ranks_s": 0.11}
    return {
        "batch": {name: TENSORS[name] for name in answers_of(OPERATIONS[operation], {}, None)},
        "metrics": metrics,
        "meta_info": {"metrics": metrics, **said, **about, "timing": timing},
    }


_BRIEF: dict[str, Any] = {
    "world_size": 2,
    "role": "actor",
    "state": "ready",
    "initialised": True,
    "epoch": 1,
    "last_heartbeat": _AT + 59.0,
    "cause": None,
    "agent": "local",
}
_AGENT: dict[str, Any] = {
    "name": "local",
    "host": "gpu-1",
    "device": "cpu",
    "slots": 4,
    "free": 2,
    "last_heartbeat": _AT + 59.0,
}
_JOB: dict[str, Any] = {
    "id": JOB_ID,
    "operation": "update_actor",
    "identifier": _GROUP,
    "state": "finished",
    "waits_for": None,
    "attempt": 1,
    "epoch": 1,
    "created_at": _AT,
    "started_at": _AT + 0.005,
    "finished_at": _AT + 0.155,
    "error": None,
    "result_url": f"/jobs/{JOB_ID}/result",
}
_NOT_STARTED = {
    "attempt": 0,
    "epoch": None,
    "started_at": None,
    "finished_at": None,
    "result_url": None,
}
QUEUED: dict[str, Any] = (
    _JOB | _NOT_STARTED | {"state": "queued", "waits_for": f"the consumer of train:{_GROUP}"}
)
CANCELLED: dict[str, Any] = {
    **QUEUED,
    "state": "cancelled",
    "waits_for": None,
    "finished_at": _AT + 1.0,
    "error": {
        "code": "JOB_CANCELLED",
        "message": "the job was cancelled before it ran",
        "retryable": False,
        "identifier": None,
        "job_id": JOB_ID,
        "rank": None,
    },
    "result_url": f"/jobs/{JOB_ID}/result",
}

OPERATION_ANSWERS: dict[str, dict[str, Any]] = {
    "init_model": {**_DONE, "already": False, **_MODEL},
    "update_actor": _result("update_actor", _LEARNED | _STEPPED, **_VERSION),
    "update_actor_with_distillation": _result(
        "update_actor_with_distillation",
        {**_LEARNED, "actor/teacher_kl": 0.3, **_STEPPED},
        **_VERSION,
    ),
    "forward_backward": _result("forward_backward", _LEARNED),
    "optim_step": {
        **_DONE,
        "metrics": _STEPPED,
        "meta_info": {**_VERSION, "timing": {"ranks_s": 0.04}, "ignored": []},
    },
    "compute_log_prob": _result("compute_log_prob", {}),
    "compute_ref_log_prob": _result("compute_ref_log_prob", {}),
    "compute_values": _result("compute_values", {}),
    "update_critic": _result("update_critic", _CRITICISED, **_VERSION),
    "compute_rewards": _result("compute_rewards", {}),
    "save_checkpoint": {
        **_DONE,
        "weight_version": 1,
        "path": "/data/ckpt/step_1",
        "global_step": 1,
        "kind": "sharded",
        "nbytes": 336648,
        "world_size": 2,
    },
    "load_checkpoint": {
        **_DONE,
        "path": "/data/ckpt/step_1",
        "kind": "sharded",
        "global_step": 1,
        "optimizer": "restored",
        "rng": "restored",
    },
    "convert_checkpoint_to_huggingface": {
        **_DONE,
        "path": "/data/ckpt/step_1-hf",
        "kind": "huggingface",
    },
    INITIALIZE: {**_DONE, "role": "actor", "world_size": 2, "already": False, "ignored": []},
    "barrier": _DONE,
    "destroy": _DONE,
}
"""What each operation answers, by its name."""

JOB: dict[str, Any] = _JOB
JOBS: dict[str, Any] = {"jobs": [_JOB]}
PART: dict[str, Any] = {"payload": PARTS["payload"], "part": 0, "nbytes": 104857600}
PAYLOAD: dict[str, Any] = {"payload": PARTS["payload"], "parts": [0, 1, 2], "nbytes": 262144000}
READY: dict[str, Any] = {"ready": True, "redis": "ok", "payload_store": "ok", "reasons": []}
_AWAY = {"redis": "unavailable", "payload_store": "ok", "reasons": ["Redis does not answer"]}
NOT_READY: dict[str, Any] = {"ready": False, **_AWAY}
HEALTH: dict[str, Any] = {
    "status": "healthy",
    "redis": "ok",
    "payload_store": "ok",
    "reasons": [],
    "groups": {_GROUP: _BRIEF},
    "agents": [_AGENT],
    "checkpointers": [{**_AGENT, "name": "local-1", "slots": 1, "free": 1}],
    "slots": {"total": 4, "free": 2},
}
UNHEALTHY: dict[str, Any] = {"status": "degraded", **_AWAY}
MODELS: dict[str, Any] = {
    "status": "success",
    "identifiers": [_GROUP],
    "count": 1,
    "models": {_GROUP: _BRIEF},
}
WORKER_INFO: dict[str, Any] = {
    "status": "success",
    "identifier": _GROUP,
    **_BRIEF,
    "seq": 1,
    "nodes": ["gpu-1"],
    "running_job": None,
    "ignored": [],
    "config": {"model": {"path": PATH}, "optim": {"lr": 0.001}, "policy_loss": "ppo"},
    "created_at": _AT,
    "info": {**_MODEL, "host": "gpu-1", "pid": 4711},
}
METRICS = """# HELP nexrl_jobs Jobs that have not ended.
# TYPE nexrl_jobs gauge
nexrl_jobs{queue="student",state="queued"} 1.0
# HELP nexrl_slots_free Slots without a rank.
# TYPE nexrl_slots_free gauge
nexrl_slots_free 2.0
"""


_SHOWN = (
    ServiceError(
        "MALFORMED",
        (
            "the body is not JSON: Expecting property name enclosed in double quotes: line 1 "
            "column 2 "
            "(char 1)"
        ),
    ),
    ServiceError("IDENTIFIER_REQUIRED", "name one of the groups: ?identifier=student or teacher"),
    ServiceError(
        "GROUP_NOT_FOUND",
        "there is no worker group 'studnet'; initialize_worker makes one",
        identifier="studnet",
    ),
    ServiceError("JOB_NOT_FOUND", f"there is no job {JOB_ID}", job_id=JOB_ID),
    ServiceError(
        "GROUP_NOT_READY",
        "group 'student' has no model yet; call init_model first",
        identifier="student",
    ),
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
        "EXPIRED",
        f"job {JOB_ID} ended more than a day or very many jobs ago, and its result is gone",
        job_id=JOB_ID,
    ),
    ServiceError(
        "TOO_LARGE",
        "the body has 40000000 bytes or more and the limit is 33554432; send tensors as the "
        "binary frame "
        f"({FRAME_TYPE}) instead, as nexrl_client does",
        limit=33554432,
    ),
    ServiceError(
        "UNSUPPORTED_TYPE",
        f"Content-Type 'text/plain' is not known here; send application/json or {FRAME_TYPE}",
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
    ServiceError(
        "OPERATION_FAILED",
        "RuntimeError: out of memory",
        rank=1,
        job_id=JOB_ID,
        identifier="student",
    ),
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
        (
            f"job {JOB_ID} is queued; the gateway waits no longer, the job goes on: GET "
            f"/jobs/{JOB_ID}/result"
        ),
        job_id=JOB_ID,
        identifier="student",
    ),
    ServiceError(
        "NO_SPACE",
        "the payload store's disk is full: free space in its folder, or send the batch later",
    ),
)
ERROR_EXAMPLES: dict[str, dict[str, Any]] = {
    error.code: {"error": error.body()} for error in _SHOWN
}
"""Whole bodies by code: at least one for every status that a route declares."""
