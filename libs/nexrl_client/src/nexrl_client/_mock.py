"""MockTrainServiceClient: the interface without a service, for trying a trainer's loop."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensor_codec
from nexrl_contract.batch import answers_of, check_batch, check_params
from nexrl_contract.config import parse_config
from nexrl_contract.errors import ServiceError
from nexrl_contract.operations import INITIALIZE, OPERATIONS, Operation
from nexrl_contract.sections import ActorConfig
from nexrl_contract.tensors import TENSORS, TensorSpec
from numpy.typing import NDArray

from ._api import BatchLike, TrainServiceClient
from ._call import Call, prepare
from ._exchange import Budget
from ._handle import JobHandle
from ._tensors import own_kind, to_numpy
from .errors import JobFinal, JobNotFound, status_error

_MAIN_LOSS = {"actor": "pg_loss", "critic": "vf_loss"}
_COMPARED = ("input_ids", "attention_mask", "responses")


class MockTrainServiceClient(TrainServiceClient):
    """Answers at once, in the service's shapes, without a service.

    Tensors and metrics are 0, nothing is trained or written. Batches and configurations are refused
    as the service refuses them, where that needs no look at values. config is the group's entry,
    as of HTTPTrainServiceClient.
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
        job_id, before = uuid.uuid4().hex, self._config
        if operation == INITIALIZE:  # what says which tensors an update needs from now on
            role = {"role": call.params["role"]} if "role" in call.params else {}
            self._config = {**call.params["config_dict"], **role}
        try:
            self._results[job_id] = self._answer(call, job_id)
        except ServiceError as error:
            self._config = before
            raise status_error(error.kind.status, error.body()) from None
        self._operations[job_id] = operation
        return JobHandle(job_id, operation, self)

    def _run(
        self, operation: str, batch: BatchLike | None, params: Mapping[str, Any]
    ) -> dict[str, Any]:
        job = self.submit(operation, batch, **params)
        try:
            return job.result()
        finally:
            del self._results[job.id], self._operations[job.id]

    def health_check(self) -> dict[str, Any]:
        return {"status": "healthy", "groups": {self._name: "ready"}}

    def get_models(self) -> dict[str, Any]:
        models = {self._name: self.worker_info()}
        return {
            "status": "success",
            "identifiers": [*models],
            "count": len(models),
            "models": models,
        }

    def worker_info(self) -> dict[str, Any]:
        return {
            "identifier": self._name,
            "world_size": 1,
            "role": self._role,
            "state": "ready",
            "initialised": True,
        }

    def job_view(self, job_id: str) -> dict[str, Any]:
        """See JobHandle.status; every job of the mock has finished."""
        self._find(job_id)
        return {
            "id": job_id,
            "operation": self._operations[job_id],
            "identifier": self._name,
            "state": "finished",
        }

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
    def _actor(self) -> ActorConfig | None:
        """The group's settings, None of a client without a configuration; raises ServiceError."""
        actor = (self._config or {}).get("actor")
        if not isinstance(actor, Mapping):
            return None
        config = {**(self._config or {}), "actor": {"model": {"path": "mock"}, **actor}}
        return parse_config(config, self._role).entry.actor

    def _find(self, job_id: str) -> dict[str, Any]:
        if job_id not in self._results:
            raise JobNotFound(f"there is no job {job_id}", status=404, job_id=job_id)
        return self._results[job_id]

    def _answer(self, call: Call, job_id: str) -> dict[str, Any]:
        """Raises ServiceError, as the service would."""
        head = {"status": "success", "identifier": self._name, "job_id": job_id}
        operation = OPERATIONS[call.operation]
        actor = self._actor if operation.takes_batch or call.operation == INITIALIZE else None
        if call.frame is None:
            return head | _other_fields(call)
        check_params(operation, call.params)
        header = tensor_codec.parse_header(call.frame.header, call.frame.nbytes)
        checked = check_batch(header.tensors, operation, call.params, actor)
        _check_responses(call)
        explains = bool(call.params.get("explain"))
        metrics = _metrics(operation) if operation.trains and not explains else {}
        meta = {
            "metrics": metrics,
            "job_id": job_id,
            "identifier": self._name,
            "operation": call.operation,
            "timing": {"queued_s": 0.0, "run_s": 0.0},
            "ignored": list(dict.fromkeys([*call.ignored, *checked.ignored])),
        }
        if explains:
            meta["plan"] = {"world_size": 1, "rows": checked.rows}
        names = () if explains else answers_of(operation, call.params, actor)
        sizes = {"B": checked.rows, "R": checked.response, "K": call.params.get("top_k")}
        return {
            "batch": {name: _zeros(TENSORS[name], sizes) for name in names},
            "metrics": metrics,
            "meta_info": meta,
        }


def _other_fields(call: Call) -> dict[str, Any]:
    params = call.params
    if call.operation == INITIALIZE:
        inert = [name for name in ("zmq_base_port", "dispatch_mode") if name in params]
        config = params["config_dict"]
        role, resource = params.get("role") or config.get("role") or "actor", config.get("resource")
        size = params.get("world_size") or (resource or {}).get("world_size") or 1
        fields = {"role": role, "world_size": size, "ignored": inert, "already": False}
        return {"identifier": params["identifier"], **fields}
    if call.operation == "save_checkpoint":
        kind = "sharded" if params.get("saved_fully_shared_ckpt", True) else "huggingface"
        return {
            "path": params["local_path"],
            "global_step": params.get("global_step", 0),
            "kind": kind,
        }
    if call.operation == "convert_checkpoint_to_huggingface":
        return {"path": f"{params['local_path']}-hf"}
    return {"step_applied": False, "metrics": {}} if call.operation == "optim_step" else {}


def _metrics(operation: Operation) -> dict[str, Any]:
    """The metrics that every answer of an update has."""
    role = operation.roles[0]
    return {f"{role}/{name}": 0.0 for name in (_MAIN_LOSS[role], "grad_norm", "lr")}


def _zeros(spec: TensorSpec, sizes: Mapping[str, Any]) -> Any:
    """A tensor of an answer."""
    shape = tuple(sizes[letter] for letter in spec.answered[1:-1].split(","))
    return own_kind(np.zeros(shape, np.int64 if spec.values == "integers" else np.float32))


def _check_responses(call: Call) -> None:
    """Responses are the last R columns of input_ids wherever a token is attended; raises
    INVALID_TENSOR."""
    tensors = call.batch.tensors if call.batch else {}
    if "responses" not in tensors:
        return
    arrays: dict[str, NDArray[Any]] = {
        name: to_numpy(tensors[name]) for name in _COMPARED if name in tensors
    }
    given = arrays["responses"]
    meant = arrays["input_ids"][:, -given.shape[1] :]
    attended = (
        arrays.get("attention_mask", np.ones_like(arrays["input_ids"]))[:, -given.shape[1] :] != 0
    )
    for row, column in np.argwhere((given != meant) & attended)[:1]:
        found, expected = given[row, column], meant[row, column]
        message = f"responses holds {found} in row {row}, column {column}; input_ids has {expected}"
        raise ServiceError("INVALID_TENSOR", message, tensor="responses")
