"""TrainServiceClient: the interface that trainers program against."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Self, TypeAlias

from ._handle import JobHandle, in_thread

BatchLike: TypeAlias = Mapping[str, Any]


class TrainServiceClient(ABC):
    """Heavy parts of training, done elsewhere. B rows, S positions, R of them responses.

    A batch is a Batch, {"tensors", "values", "metadata"}, {"batch", "non_tensor_batch",
    "meta_info"} or a flat dict of tensors (torch or NumPy). Its result: {"batch": {name: tensor},
    "metrics": {...}, "meta_info": {...}}, with the same "metrics" in meta_info. Every blocking
    method waits at most request_timeout seconds, then raises ServiceTimeout; the job goes on. With
    explain=True nothing runs, and meta_info["plan"] says what would: rows, micro-batches, tokens,
    memory. Log-probabilities that were not computed may be sent as zeros [B, 1]: where R > 1 they
    are left out, and named in meta_info["ignored"].
    """

    request_timeout: float | None = 200
    """Seconds that one call waits for its result, uploading not counted; read at every call. None:
    no limit."""

    def __init__(
        self,
        identifier: str | None = None,
        request_timeout: float | None = 200,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._identifier = identifier
        self.request_timeout = request_timeout
        self._config = config

    @property
    def identifier(self) -> str | None:
        """The worker group; None means the only one there is."""
        return self._identifier

    def _run(
        self, operation: str, batch: BatchLike | None, params: Mapping[str, Any]
    ) -> dict[str, Any]:
        """One operation and its result, within request_timeout."""
        return self.submit(operation, batch, **params).result(self.request_timeout)

    def initialize_worker(
        self,
        config_path: str | None = None,
        config_dict: Mapping[str, Any] | None = None,
        role: str = "actor",
        world_size: int | None = None,
        zmq_base_port: int | None = None,
        dispatch_mode: str | None = None,
    ) -> dict[str, Any]:
        """Start the worker group, or find it running with the same settings ("already": True).

        config_path is a YAML file of this machine, a whole service's or one entry; config_dict wins
        over it. A client of create_train_service_clients needs neither: it has its configuration
        and role from its entry. world_size None takes the configuration's; so does role "actor",
        where that has a role. zmq_base_port and dispatch_mode come back under "ignored".
        """
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
        """Load the model; on a group that has one, nothing changes ("already": True)."""
        return self._run("init_model", None, {})

    def barrier(self) -> dict[str, Any]:
        """Return once every earlier job of the group has ended and all its ranks have met."""
        return self._run("barrier", None, {})

    def destroy(self) -> dict[str, Any]:
        """Stop the group; its slots are free when this returns."""
        return self._run("destroy", None, {})

    def update_actor(self, batch: BatchLike, *, explain: bool = False) -> dict[str, Any]:
        """One policy update of the whole batch; metrics over all ranks, such as "actor/grad_norm".

        Of a group whose policy_loss is linear, batch["log_probs"] [B, R] come back.
        """
        return self._run("update_actor", batch, _given(explain=explain))

    def update_actor_with_distillation(
        self,
        batch: BatchLike,
        distillation_coeff: float | None = None,
        distillation_loss: str | None = None,
        *,
        explain: bool = False,
    ) -> dict[str, Any]:
        """One update towards a teacher: its teacher_log_probs [B, S] or [B, R] for
        "policy_gradient".

        "forward_kl" and "reverse_kl" take teacher_topk_ids and teacher_topk_log_probs [B, R, K].
        None takes the metadata's coefficient and the group's loss. old_student_log_probs is
        old_log_probs of a batch without one.
        """
        params = _given(
            distillation_coeff=distillation_coeff,
            distillation_loss=distillation_loss,
            explain=explain,
        )
        return self._run("update_actor_with_distillation", batch, params)

    def compute_log_prob(
        self, batch: BatchLike, top_k: int | None = None, *, explain: bool = False
    ) -> dict[str, Any]:
        """Log-probabilities under the current weights: batch["old_log_probs"] is [B, R] float32,
        rows in order.

        top_k=K adds the K likeliest tokens of every position, teacher_topk_ids [B, R, K] int64, and
        their teacher_topk_log_probs [B, R, K] float32.
        """
        return self._run("compute_log_prob", batch, _given(top_k=top_k, explain=explain))

    def compute_ref_log_prob(self, batch: BatchLike, *, explain: bool = False) -> dict[str, Any]:
        """Log-probabilities under the reference weights: batch["ref_log_prob"] is [B, R] float32,
        rows in order."""
        return self._run("compute_ref_log_prob", batch, _given(explain=explain))

    def compute_values(self, batch: BatchLike, *, explain: bool = False) -> dict[str, Any]:
        """A critic's batch["values"] [B, R] float32: column k is of the position before response
        token k."""
        return self._run("compute_values", batch, _given(explain=explain))

    def update_critic(self, batch: BatchLike, *, explain: bool = False) -> dict[str, Any]:
        """One update of a critic towards returns, clipped around values: [B, S] or [B, R]; see
        "critic/grad_norm"."""
        return self._run("update_critic", batch, _given(explain=explain))

    def compute_rewards(self, batch: BatchLike, *, explain: bool = False) -> dict[str, Any]:
        """A reward model's batch["rewards"] [B] float32, read at the last attended position of each
        row."""
        return self._run("compute_rewards", batch, _given(explain=explain))

    def forward_backward(
        self, batch: BatchLike, loss: str | None = None, *, explain: bool = False
    ) -> dict[str, Any]:
        """Add the batch's gradients to the pending ones; loss None takes the group's policy loss.

        "linear" is the sum of the batch's loss_weights times the log-probabilities,
        batch["log_probs"] [B, R].
        """
        return self._run("forward_backward", batch, _given(loss=loss, explain=explain))

    def optim_step(
        self, lr: float | None = None, grad_clip: float | None = None, discard: bool = False
    ) -> dict[str, Any]:
        """Apply the pending gradients, normalised over all of them; lr and grad_clip hold for this
        step alone.

        discard=True drops them instead.
        """
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
        """Save under the service's checkpoint root; published, complete and safe to load when this
        returns.

        saved_fully_shared_ckpt=True is sharded and can be resumed from, False a Hugging Face
        folder.
        """
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
        """Load a published checkpoint; del_local_after_load removes only a copy that the load
        itself fetched."""
        params = {
            "path": str(path),
            "del_local_after_load": del_local_after_load,
            "load_weight_only": load_weight_only,
        }
        return self._run("load_checkpoint", None, params)

    def convert_checkpoint_to_huggingface(self, local_path: str) -> dict[str, Any]:
        """Make a Hugging Face folder of a sharded checkpoint, or of the current weights at a new
        path; see "path"."""
        return self._run("convert_checkpoint_to_huggingface", None, {"local_path": str(local_path)})

    @abstractmethod
    def health_check(self) -> dict[str, Any]:
        """What the service says of itself, asked once: {"status": "healthy" or "degraded", ...}."""

    @abstractmethod
    def get_models(self) -> dict[str, Any]:
        """All worker groups: {"identifiers": [...], "count": n, "models": {identifier: {...}}}."""

    @abstractmethod
    def worker_info(self) -> dict[str, Any]:
        """The record of this client's group."""

    @contextmanager
    def actor_context(self) -> Iterator[Self]:
        """A context that does nothing, for trainers that were written around one; yields the
        client."""
        yield self

    @abstractmethod
    def submit(self, operation: str, batch: BatchLike | None = None, **params: Any) -> JobHandle:
        """Start an operation (a method's name, with its arguments) and return at once, after the
        upload."""

    async def submit_async(
        self, operation: str, batch: BatchLike | None = None, **params: Any
    ) -> JobHandle:
        """As submit, without blocking the event loop; await the handle's result_async().

        The batch must not change before this returns. Cancelled, it may have submitted all the
        same.
        """
        return await in_thread(partial(self.submit, operation, batch, **params))


def _given(*, explain: bool, **params: Any) -> dict[str, Any]:
    """The arguments that are not the defaults: only those travel."""
    given = {name: value for name, value in params.items() if value is not None}
    return given | {"explain": True} if explain else given
