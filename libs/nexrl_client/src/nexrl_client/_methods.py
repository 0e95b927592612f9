"""The blocking methods, each one call of an operation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

from ._api import BatchLike, TrainServiceClient


class OperationMethods(TrainServiceClient):
    """TrainServiceClient's operations by way of one method, _run."""

    def __init__(
        self, identifier: str | None, request_timeout: float | None, config: Mapping[str, Any] | None = None
    ) -> None:
        self._identifier = identifier
        self.request_timeout = request_timeout
        self._config = config

    @property
    def identifier(self) -> str | None:
        return self._identifier

    @abstractmethod
    def _run(self, operation: str, batch: BatchLike | None, params: Mapping[str, Any]) -> dict[str, Any]:
        """submit(...).result(self.request_timeout)."""

    def initialize_worker(
        self,
        config_path: str | None = None,
        config_dict: Mapping[str, Any] | None = None,
        role: str = "actor",
        world_size: int | None = None,
        zmq_base_port: int | None = None,
        dispatch_mode: str | None = None,
    ) -> dict[str, Any]:
        params = {
            "config_path": config_path,
            "config_dict": config_dict,
            "role": role,
            "world_size": world_size,
            "zmq_base_port": zmq_base_port,
            "dispatch_mode": dispatch_mode,
        }
        return self._run("initialize_worker", None, params)

    def init_model(self) -> dict[str, Any]:
        return self._run("init_model", None, {})

    def barrier(self) -> dict[str, Any]:
        return self._run("barrier", None, {})

    def destroy(self) -> dict[str, Any]:
        return self._run("destroy", None, {})

    def update_actor(self, batch: BatchLike, *, explain: bool = False) -> dict[str, Any]:
        return self._run("update_actor", batch, _given(explain=explain))

    def update_actor_with_distillation(
        self,
        batch: BatchLike,
        distillation_coeff: float | None = None,
        distillation_loss: str | None = None,
        *,
        explain: bool = False,
    ) -> dict[str, Any]:
        params = _given(distillation_coeff=distillation_coeff, distillation_loss=distillation_loss, explain=explain)
        return self._run("update_actor_with_distillation", batch, params)

    def compute_log_prob(self, batch: BatchLike, top_k: int | None = None, *, explain: bool = False) -> dict[str, Any]:
        return self._run("compute_log_prob", batch, _given(top_k=top_k, explain=explain))

    def compute_ref_log_prob(self, batch: BatchLike, *, explain: bool = False) -> dict[str, Any]:
        return self._run("compute_ref_log_prob", batch, _given(explain=explain))

    def compute_values(self, batch: BatchLike, *, explain: bool = False) -> dict[str, Any]:
        return self._run("compute_values", batch, _given(explain=explain))

    def update_critic(self, batch: BatchLike, *, explain: bool = False) -> dict[str, Any]:
        return self._run("update_critic", batch, _given(explain=explain))

    def compute_rewards(self, batch: BatchLike, *, explain: bool = False) -> dict[str, Any]:
        return self._run("compute_rewards", batch, _given(explain=explain))

    def forward_backward(self, batch: BatchLike, loss: str | None = None, *, explain: bool = False) -> dict[str, Any]:
        return self._run("forward_backward", batch, _given(loss=loss, explain=explain))

    def optim_step(
        self, lr: float | None = None, grad_clip: float | None = None, discard: bool = False
    ) -> dict[str, Any]:
        return self._run("optim_step", None, {"lr": lr, "grad_clip": grad_clip, "discard": discard})

    def save_checkpoint(
        self,
        local_path: str,
        hdfs_path: str | None = None,
        global_step: int = 0,
        saved_fully_shared_ckpt: bool = True,
        save_weight_only: bool = False,
        remove_previous_ckpt: bool = True,
    ) -> dict[str, Any]:
        params = {
            "local_path": str(local_path),
            "hdfs_path": hdfs_path,
            "global_step": global_step,
            "saved_fully_shared_ckpt": saved_fully_shared_ckpt,
            "save_weight_only": save_weight_only,
            "remove_previous_ckpt": remove_previous_ckpt,
        }
        return self._run("save_checkpoint", None, params)

    def load_checkpoint(
        self, path: str, del_local_after_load: bool = True, load_weight_only: bool = False
    ) -> dict[str, Any]:
        params = {
            "path": str(path),
            "del_local_after_load": del_local_after_load,
            "load_weight_only": load_weight_only,
        }
        return self._run("load_checkpoint", None, params)

    def convert_checkpoint_to_huggingface(self, local_path: str) -> dict[str, Any]:
        return self._run("convert_checkpoint_to_huggingface", None, {"local_path": str(local_path)})

    @contextmanager
    def actor_context(self) -> Iterator[Self]:
        yield self


def _given(*, explain: bool, **params: Any) -> dict[str, Any]:
    """The arguments that are not the defaults: only those travel."""
    given = {name: value for name, value in params.items() if value is not None}
    return given | {"explain": True} if explain else given
