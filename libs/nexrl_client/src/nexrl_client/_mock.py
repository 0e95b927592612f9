"""MockTrainServiceClient: the interface without a service, for trying a trainer's loop."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
from nexrl_contract.operations import required_tensors
from numpy.typing import NDArray

from ._api import BatchLike
from ._arrays import to_numpy
from ._call import Call, prepare
from ._exchange import Budget
from ._handle import JobHandle
from ._methods import OperationMethods
from ._tensors import own_kind
from .errors import InvalidTensor, JobFinal, JobNotFound

_BY_TOKEN = {"compute_log_prob": "old_log_probs", "compute_ref_log_prob": "ref_log_prob", "compute_values": "values"}
_POLICY_UPDATES = ("update_actor", "forward_backward")
_METRICS = {
    **dict.fromkeys((*_POLICY_UPDATES, "update_actor_with_distillation"), ("actor", "pg_loss")),
    "update_critic": ("critic", "vf_loss"),
}
_COMPARED = ("input_ids", "attention_mask", "responses")
_WHOLE = ("attention_mask", "position_ids", "loss_mask", "scoring_attention_mask")


class MockTrainServiceClient(OperationMethods):
    """Answers at once, in the service's shapes: tensors and metrics are 0, nothing is trained or written.

    Batches are checked for required tensors and fitting shapes, and refused as the service would. config is the
    group's own entry, as of HTTPTrainServiceClient.
    """

    def __init__(
        self,
        url: str = "mock://localhost",
        identifier: str | None = None,
        *,
        request_timeout: float | None = 200,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(identifier, request_timeout, config)
        self.base_url = url
        self._results: dict[str, dict[str, Any]] = {}
        self._operations: dict[str, str] = {}

    def submit(self, operation: str, batch: BatchLike | None = None, **params: Any) -> JobHandle:
        call = prepare(operation, batch, params, self.identifier, self._config)
        if call.batch is not None:
            _check_shapes(call, self._actor)
        if operation == "initialize_worker":
            self._config = call.params["config_dict"]  # what says which tensors an update needs from now on
        job_id = uuid.uuid4().hex
        self._results[job_id] = self._answer(call, job_id)
        self._operations[job_id] = operation
        return JobHandle(job_id, operation, self)

    def _run(self, operation: str, batch: BatchLike | None, params: Mapping[str, Any]) -> dict[str, Any]:
        job = self.submit(operation, batch, **params)
        try:
            return job.result()
        finally:
            del self._results[job.id], self._operations[job.id]

    def health_check(self) -> dict[str, Any]:
        return {"status": "healthy", "groups": {self._name: "ready"}}

    def get_models(self) -> dict[str, Any]:
        models = {self._name: self.worker_info()}
        return {"status": "success", "identifiers": [*models], "count": len(models), "models": models}

    def worker_info(self) -> dict[str, Any]:
        return {"identifier": self._name, "world_size": 1, "role": self._role, "state": "ready", "initialised": True}

    def job_view(self, job_id: str) -> dict[str, Any]:
        """See JobHandle.status; every job of the mock has finished."""
        self._find(job_id)
        return {"id": job_id, "operation": self._operations[job_id], "identifier": self._name, "state": "finished"}

    def job_result(self, job: JobHandle, budget: Budget) -> dict[str, Any]:
        """See JobHandle.result; never waits."""
        return self._find(job.id)

    def cancel_job(self, job_id: str) -> dict[str, Any]:
        """See JobHandle.cancel; always too late."""
        self._find(job_id)
        raise JobFinal(f"job {job_id} has finished already", status=409, job_id=job_id)

    @property
    def _name(self) -> str:
        return self.identifier or "default"

    @property
    def _role(self) -> str:
        return str((self._config or {}).get("role") or "actor")

    @property
    def _actor(self) -> Mapping[str, Any]:
        actor = (self._config or {}).get("actor")
        return actor if isinstance(actor, Mapping) else {}

    def _find(self, job_id: str) -> dict[str, Any]:
        if job_id not in self._results:
            raise JobNotFound(f"there is no job {job_id}", status=404, job_id=job_id)
        return self._results[job_id]

    def _answer(self, call: Call, job_id: str) -> dict[str, Any]:
        head = {"status": "success", "identifier": self._name, "job_id": job_id}
        if call.batch is None:
            return head | _other_fields(call)
        explains = bool(call.params.get("explain"))
        metrics = {} if explains else _metrics(call.operation)
        batch = {} if explains else _result_batch(call, self._actor)
        meta = {
            "metrics": metrics,
            "job_id": job_id,
            "identifier": self._name,
            "operation": call.operation,
            "timing": {"queued_s": 0.0, "run_s": 0.0},
            "ignored": list(call.ignored),
        }
        if explains:
            meta["plan"] = {"world_size": 1, "rows": _response_shape(call)[0]}
        return {"batch": batch, "metrics": metrics, "meta_info": meta}


def _other_fields(call: Call) -> dict[str, Any]:
    params = call.params
    if call.operation == "initialize_worker":
        inert = [name for name in ("zmq_base_port", "dispatch_mode") if name in params]
        config = params["config_dict"]
        role, resource = params.get("role") or config.get("role") or "actor", config.get("resource")
        size = params.get("world_size") or (resource or {}).get("world_size") or 1
        fields = {"role": role, "world_size": size, "ignored": inert, "already": False}
        return {"identifier": params["identifier"], **fields}
    if call.operation == "save_checkpoint":
        kind = "sharded" if params.get("saved_fully_shared_ckpt", True) else "huggingface"
        return {"path": params["local_path"], "global_step": params.get("global_step", 0), "kind": kind}
    if call.operation == "convert_checkpoint_to_huggingface":
        return {"path": f"{params['local_path']}-hf"}
    return {"step_applied": False, "metrics": {}} if call.operation == "optim_step" else {}


def _metrics(operation: str) -> dict[str, Any]:
    """The metrics that every answer of an update has."""
    if operation not in _METRICS:
        return {}
    role, loss = _METRICS[operation]
    return {f"{role}/{name}": 0.0 for name in (loss, "grad_norm", "lr")}


def _result_batch(call: Call, actor: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors that the service answers with, all of zeros."""
    rows, columns = _response_shape(call)
    shapes: dict[str, tuple[int, ...]] = {}
    if call.operation in _BY_TOKEN:
        shapes[_BY_TOKEN[call.operation]] = (rows, columns)
    elif call.operation == "compute_rewards":
        shapes["rewards"] = (rows,)
    elif call.operation in _POLICY_UPDATES and (call.params.get("loss") or actor.get("policy_loss")) == "linear":
        shapes["log_probs"] = (rows, columns)
    batch = {name: own_kind(np.zeros(shape, np.float32)) for name, shape in shapes.items()}
    if count := call.params.get("top_k"):
        batch["teacher_topk_ids"] = own_kind(np.zeros((rows, columns, count), np.int64))
        batch["teacher_topk_log_probs"] = own_kind(np.zeros((rows, columns, count), np.float32))
    return batch


def _response_shape(call: Call) -> tuple[int, int]:
    """B and R of the batch."""
    tensors = call.batch.tensors if call.batch else {}
    rows, length = (int(size) for size in tensors["input_ids"].shape)
    return rows, int(tensors["responses"].shape[1]) if "responses" in tensors else length - 1


def _check_shapes(call: Call, actor: Mapping[str, Any]) -> None:
    """Required tensors, [B, S] of what is whole, and one B for all; raises InvalidTensor."""
    tensors = call.batch.tensors if call.batch else {}
    for name in required_tensors(call.operation, call.params, actor):
        if name not in tensors:
            given = ", ".join(tensors) or "none"
            raise _refused(name, f"{call.operation} needs the tensor {name}; the batch has {given}")
    shapes = {name: tuple(int(size) for size in tensor.shape) for name, tensor in tensors.items()}
    whole = shapes["input_ids"]
    if len(whole) != 2 or "int" not in str(tensors["input_ids"].dtype):
        raise _refused("input_ids", f"input_ids has shape {list(whole)}; it must be integers of [B, S]")
    for name, shape in shapes.items():
        if shape[:1] != whole[:1]:
            raise _refused(name, f"{name} has shape {list(shape)}; input_ids has {whole[0]} rows")
        if name in _WHOLE and shape != whole:
            raise _refused(name, f"{name} has shape {list(shape)}; it must be that of input_ids, {list(whole)}")
    if "responses" in tensors:
        _check_responses({name: to_numpy(tensors[name]) for name in _COMPARED if name in tensors})


def _check_responses(arrays: Mapping[str, NDArray[Any]]) -> None:
    """Responses are the last R columns of input_ids wherever a token is attended; raises InvalidTensor."""
    given = arrays["responses"]
    if given.ndim != 2 or not 1 <= given.shape[1] < arrays["input_ids"].shape[1]:
        raise _refused("responses", f"responses has shape {list(given.shape)}; it must be [B, R] with R below S")
    meant = arrays["input_ids"][:, -given.shape[1] :]
    attended = arrays.get("attention_mask", np.ones_like(arrays["input_ids"]))[:, -given.shape[1] :] != 0
    for row, column in np.argwhere((given != meant) & attended)[:1]:
        found, expected = given[row, column], meant[row, column]
        raise _refused("responses", f"responses holds {found} in row {row}, column {column}; input_ids has {expected}")


def _refused(name: str, message: str) -> InvalidTensor:
    return InvalidTensor(message, status=422, details={"tensor": name})
