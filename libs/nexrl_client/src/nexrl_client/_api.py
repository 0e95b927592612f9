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
    """One worker group of the service: the heavy parts of training, done elsewhere.

    A batch is a Batch, {"tensors", "values", "metadata"}, {"batch", "non_tensor_batch",
    "meta_info"} or a flat dict of tensors. Tensors are of torch or NumPy. B is the number of rows,
    S of the columns of input_ids, R of the columns of responses, which are the last R of the S.

    A method that takes a batch returns {"batch": {name: tensor}, "metrics": {...}, "meta_info":
    {...}}. Rows come back in the order in which they were sent. meta_info has the same metrics, the
    job_id, the timing, and under "ignored" the names of what was sent and did nothing.

    Every method waits at most request_timeout seconds for its result, then raises ServiceTimeout.
    The job goes on, and the error's .job waits for it. With explain=True nothing runs:
    meta_info["plan"] says what would run (rows, micro-batches, tokens, memory).
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
        """Start the worker group, and wait until its ranks run.

        config_dict is the group's configuration, {"actor": {...}, "resource": {...}}. config_path
        is a YAML file on this machine instead: a whole service's, or one entry. config_dict wins
        over it. A client of create_train_service_clients needs neither. role is "actor", "ref",
        "teacher", "critic" or "reward". world_size is the number of ranks. Without one, and with
        the role "actor", the configuration's hold. zmq_base_port and dispatch_mode do nothing and
        come back under "ignored".

        Returns {"identifier", "role", "world_size", "already", "ignored", ...}; "already" is True
        where the group runs with the same settings. Raises InvalidSetup where nothing names the
        group or its configuration, GroupExists where it runs with other settings, InvalidConfig
        with the key, NoSuchSlots where no agent could host it, GroupDown where no agent is alive.
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
        """Load the model. On a group that has loaded it nothing changes ("already": True).

        Raises CheckpointInvalid or InvalidConfig where the model's folder cannot be used.
        """
        return self._run("init_model", None, {})

    def barrier(self) -> dict[str, Any]:
        """Wait until every earlier job of the group has ended and its saves are published."""
        return self._run("barrier", None, {})

    def destroy(self) -> dict[str, Any]:
        """Stop the group. Its slots are free when this returns; what was not saved is gone."""
        return self._run("destroy", None, {})

    def update_actor(self, batch: BatchLike, *, explain: bool = False) -> dict[str, Any]:
        """Update the policy once with the whole batch: forward, backward, optimizer step.

        Which tensors the group's policy_loss reads is in docs/training.md. The metrics are over all
        ranks, such as "actor/loss" and "actor/grad_norm". Of a group whose policy_loss is linear,
        batch["log_probs"] [B, R] comes back. Raises InvalidTensor for a tensor that is missing or
        has a wrong shape, InvalidValue for a value that cannot be computed, with its row, and
        GradientsPending after a forward_backward without optim_step.
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
        """Update the policy once towards a teacher.

        distillation_loss "policy_gradient" reads teacher_log_probs [B, S] or [B, R]. "forward_kl"
        and "reverse_kl" read teacher_topk_ids and teacher_topk_log_probs [B, R, K], which
        compute_log_prob(top_k=K) of the teacher gives. None takes the group's loss, and for
        distillation_coeff what the batch's metadata says. old_student_log_probs is sent as
        old_log_probs of a batch that has none. Raises as update_actor does.
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
        """Log-probabilities of the responses under the current weights.

        batch["old_log_probs"] is [B, R] float32. top_k=K adds the K likeliest tokens of every
        position, batch["teacher_topk_ids"] [B, R, K] int64, and their log-probabilities,
        batch["teacher_topk_log_probs"] [B, R, K] float32. The names are those under which an update
        reads them, whichever group computed them.
        """
        return self._run("compute_log_prob", batch, _given(top_k=top_k, explain=explain))

    def compute_ref_log_prob(self, batch: BatchLike, *, explain: bool = False) -> dict[str, Any]:
        """Log-probabilities of the responses under the reference weights.

        batch["ref_log_prob"] is [B, R] float32. The reference is the model as it was loaded.
        """
        return self._run("compute_ref_log_prob", batch, _given(explain=explain))

    def compute_values(self, batch: BatchLike, *, explain: bool = False) -> dict[str, Any]:
        """A critic's values: batch["values"] is [B, R] float32.

        Column k is the value of the position before response token k.
        """
        return self._run("compute_values", batch, _given(explain=explain))

    def update_critic(self, batch: BatchLike, *, explain: bool = False) -> dict[str, Any]:
        """Update a critic once towards returns [B, S] or [B, R].

        Where the batch has values, shaped alike, the loss is clipped around them. The metrics are
        such as "critic/vf_loss" and "critic/grad_norm".
        """
        return self._run("update_critic", batch, _given(explain=explain))

    def compute_rewards(self, batch: BatchLike, *, explain: bool = False) -> dict[str, Any]:
        """A reward model's scores: batch["rewards"] is [B] float32.

        Each row is read at its last attended position.
        """
        return self._run("compute_rewards", batch, _given(explain=explain))

    def forward_backward(
        self, batch: BatchLike, loss: str | None = None, *, explain: bool = False
    ) -> dict[str, Any]:
        """Add the batch's gradients to the pending ones, which optim_step applies.

        loss None takes the group's policy_loss. "linear" is the sum of loss_weights [B], [B, S] or
        [B, R] times the log-probabilities, which come back as batch["log_probs"] [B, R]: a loss of
        the trainer's own. Raises as update_actor does, except GradientsPending.
        """
        return self._run("forward_backward", batch, _given(loss=loss, explain=explain))

    def optim_step(
        self, lr: float | None = None, grad_clip: float | None = None, discard: bool = False
    ) -> dict[str, Any]:
        """Apply the pending gradients, normalised over all of their batches.

        lr and grad_clip hold for this step alone. discard=True drops the gradients instead. Returns
        {"metrics": {...}, "meta_info": {...}}; metrics["step_applied"] is False where the weights
        stay as they were. Raises GradientsLost, once, where a restart of the group took the
        gradients.
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
        """Save under the service's checkpoint root. The checkpoint is complete and safe to load
        when this returns.

        local_path is relative to that root. saved_fully_shared_ckpt=True makes a sharded checkpoint
        that training resumes from, at any world size; False makes a Hugging Face folder.
        save_weight_only leaves the optimizer out. remove_previous_ckpt removes the group's previous
        checkpoint once this one is published. Returns {"path", "global_step", "kind", ...}. Raises
        PathRefused outside the root, NoSpace where the disk is full, HDFSNotConfigured for an
        hdfs_path.
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
        """Load a published checkpoint, sharded or a Hugging Face folder.

        load_weight_only leaves the optimizer as it is. del_local_after_load removes only a copy
        that the load itself fetched. Raises CheckpointInvalid where the folder is not published,
        is damaged or does not fit, and PathRefused outside the service's roots.
        """
        params = {
            "path": str(path),
            "del_local_after_load": del_local_after_load,
            "load_weight_only": load_weight_only,
        }
        return self._run("load_checkpoint", None, params)

    def convert_checkpoint_to_huggingface(self, local_path: str) -> dict[str, Any]:
        """Make a Hugging Face folder of a sharded checkpoint, or at a new path of the current
        weights.

        Returns {"path": the folder, ...}. Raises CheckpointInvalid or PathRefused.
        """
        return self._run("convert_checkpoint_to_huggingface", None, {"local_path": str(local_path)})

    @abstractmethod
    def health_check(self) -> dict[str, Any]:
        """What the service says of itself: {"status": "healthy" or "degraded", "reasons", ...}.

        Asked once and answered within 10 s, else Unreachable or ServiceTimeout.
        """

    @abstractmethod
    def get_models(self) -> dict[str, Any]:
        """All worker groups: {"identifiers", "count", "models"}, their records under "models"."""

    @abstractmethod
    def worker_info(self) -> dict[str, Any]:
        """The record of this client's group: {"state", "role", "world_size", "cause", ...}."""

    @contextmanager
    def actor_context(self) -> Iterator[Self]:
        """A context that does nothing, for trainers that were written around one; yields the
        client."""
        yield self

    @abstractmethod
    def submit(self, operation: str, batch: BatchLike | None = None, **params: Any) -> JobHandle:
        """Start an operation, a method's name with its arguments, and return after the upload.

        The handle of client.submit("compute_log_prob", batch, top_k=8) has the result() that
        client.compute_log_prob(batch, top_k=8) returns.
        """

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
