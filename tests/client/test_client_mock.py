"""MockTrainServiceClient: the service's shapes without a service."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
from nexrl_client import (
    InvalidArgument,
    InvalidConfig,
    InvalidTensor,
    JobFinal,
    JobNotFound,
    MockTrainServiceClient,
    UnknownOperation,
)


@pytest.fixture
def mock() -> MockTrainServiceClient:
    return MockTrainServiceClient(identifier="student")


def test_a_trainers_loop(mock: MockTrainServiceClient, batch: dict[str, Any]) -> None:
    """The calls of a training step work, with results of the service's shapes."""
    started = mock.initialize_worker(config_dict={"actor": {}}, world_size=2, zmq_base_port=5555)
    assert (started["status"], started["world_size"], started["ignored"]) == (
        "success",
        2,
        ["zmq_base_port"],
    )
    assert mock.init_model()["status"] == "success"
    result = mock.compute_log_prob(batch)
    assert torch.equal(result["batch"]["old_log_probs"], torch.zeros(4, 3))
    assert result["meta_info"]["ignored"] == ["prompts", "uid"]
    assert mock.compute_ref_log_prob(batch)["batch"]["ref_log_prob"].dtype == torch.float32
    batch["tensors"] |= {**result["batch"], "advantages": np.zeros(4, np.float32)}
    updated = mock.update_actor(batch)
    assert updated["metrics"]["actor/grad_norm"] == 0.0
    assert updated["meta_info"]["metrics"] is updated["metrics"]
    assert mock.forward_backward(batch, loss="cross_entropy")["metrics"]
    assert mock.optim_step(lr=1e-3)["status"] == "success"
    assert mock.save_checkpoint("ckpt/step_1", global_step=1)["path"] == "ckpt/step_1"
    assert mock.load_checkpoint("ckpt/step_1")["status"] == "success"
    assert mock.convert_checkpoint_to_huggingface("ckpt/step_1")["path"] == "ckpt/step_1-hf"
    assert mock.get_models()["identifiers"] == ["student"]
    assert mock.worker_info()["identifier"] == "student"
    assert mock.barrier()["status"] == mock.destroy()["status"] == "success"


def test_every_role_answers_in_its_shapes(
    mock: MockTrainServiceClient, batch: dict[str, Any]
) -> None:
    """Values [B, R], rewards [B], a teacher's top k [B, R, K], a linear loss's log-probabilities
    [B, R]."""
    tensors = batch["tensors"] | {"returns": np.zeros((4, 3), np.float32)}
    values = mock.compute_values(tensors)["batch"]["values"]
    assert (values.shape, values.dtype) == ((4, 3), torch.float32)
    updated = mock.update_critic(tensors)
    assert set(updated["metrics"]) == {"critic/vf_loss", "critic/grad_norm", "critic/lr"}
    rewards = mock.compute_rewards(tensors)["batch"]["rewards"]
    assert (rewards.shape, rewards.dtype) == ((4,), torch.float32)
    teacher = mock.compute_log_prob(tensors, top_k=5)["batch"]
    assert teacher["teacher_topk_ids"].shape == teacher["teacher_topk_log_probs"].shape == (4, 3, 5)
    assert (teacher["teacher_topk_ids"].dtype, teacher["old_log_probs"].shape) == (
        torch.int64,
        (4, 3),
    )
    linear = tensors | {"loss_weights": np.ones((4, 3), np.float32)}
    assert mock.forward_backward(linear, loss="linear")["batch"]["log_probs"].shape == (4, 3)
    assert mock.update_actor(tensors)["batch"] == {}
    own = MockTrainServiceClient(config={"role": "actor", "actor": {"policy_loss": "linear"}})
    assert own.update_actor(linear)["batch"]["log_probs"].shape == (4, 3)


@pytest.mark.parametrize(
    ("actor", "missing"),
    [
        ({"policy_loss": "ppo"}, "advantages"),
        (
            {
                "policy_loss": "ppo",
                "rollout_correction": {"mode": "token_mask", "drop_rejected": True},
            },
            "old_log_probs",
        ),
    ],
)
def test_what_an_update_needs_is_what_the_group_was_configured_to(
    actor: dict[str, Any], missing: str
) -> None:
    """As the service: a trainer that forgets a tensor learns it from the mock."""
    mock = MockTrainServiceClient(identifier="student")
    mock.initialize_worker(config_dict={"actor": actor}, world_size=1)
    tensors = {
        "input_ids": np.ones((2, 4), np.int64),
        "advantages": np.ones(2),
        "rollout_log_probs": np.ones((2, 3)),
    }
    with pytest.raises(InvalidTensor, match=missing):
        mock.update_actor(
            {"tensors": {name: value for name, value in tensors.items() if name != missing}}
        )


@pytest.mark.parametrize("loss", ["nope", 5, ["a"]])
def test_a_loss_that_nobody_knows(
    mock: MockTrainServiceClient, batch: dict[str, Any], loss: Any
) -> None:
    """Refused as the service does."""
    with pytest.raises(InvalidArgument, match="loss"):
        mock.forward_backward(batch, loss=loss)


def test_a_refused_configuration_changes_nothing(mock: MockTrainServiceClient) -> None:
    """And one is read for the role that it is given for."""
    with pytest.raises(InvalidConfig, match="zz"):
        mock.initialize_worker(config_dict={"actor": {"zz": 1}})
    assert mock.barrier()["status"] == "success"
    other_loss = {"actor": {"policy_loss": "gspo", "loss_agg_mode": "token-mean"}}
    with pytest.raises(InvalidConfig, match="gspo"):
        mock.initialize_worker(config_dict=other_loss)
    assert mock.initialize_worker(config_dict=other_loss, role="critic")["role"] == "critic"


def test_plans(mock: MockTrainServiceClient, batch: dict[str, Any]) -> None:
    """explain=True is answered with a plan, and with nothing else."""
    result = mock.update_actor(batch, explain=True)
    assert (result["batch"], result["metrics"], result["meta_info"]["plan"]["rows"]) == ({}, {}, 4)
    assert "plan" not in mock.update_actor(batch)["meta_info"]


def test_tensors_that_are_needed(mock: MockTrainServiceClient, batch: dict[str, Any]) -> None:
    """What the operation, its arguments or the group's loss cannot do without is asked for."""
    with pytest.raises(InvalidTensor, match="update_critic needs the tensor returns"):
        mock.update_critic(batch)
    with pytest.raises(InvalidTensor, match="teacher_topk_ids"):
        mock.update_actor_with_distillation(batch, distillation_loss="forward_kl")
    with pytest.raises(InvalidTensor, match="loss_weights"):
        mock.forward_backward(batch, loss="linear")
    with pytest.raises(InvalidTensor, match="advantages"):
        MockTrainServiceClient(config={"actor": {"policy_loss": "ppo"}}).update_actor(batch)


def test_columns_without_responses(mock: MockTrainServiceClient) -> None:
    """Without responses R is S - 1."""
    assert mock.compute_log_prob({"input_ids": np.zeros((2, 7), np.int32)})["batch"][
        "old_log_probs"
    ].shape == (2, 6)


def test_submitted_jobs_are_done(mock: MockTrainServiceClient, batch: dict[str, Any]) -> None:
    """A handle has its result at once, every time; it is too late to cancel."""
    job = mock.submit("compute_log_prob", batch)
    assert job.done()
    assert job.status()["state"] == "finished"
    assert (
        job.result(timeout=0)["meta_info"]["job_id"]
        == job.result()["meta_info"]["job_id"]
        == job.id
    )
    with pytest.raises(JobFinal):
        job.cancel()
    job.id = "0" * 32
    with pytest.raises(JobNotFound):
        job.result()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "needs the tensor input_ids"),
        ({"input_ids": np.zeros(4, int)}, r"input_ids has shape \[4\]"),
        ({"input_ids": np.zeros((4, 6))}, "expected integers"),
        ({"attention_mask": np.ones((4, 5), int)}, r"attention_mask.*expected \[4,6\]"),
        ({"responses": np.zeros((3, 3), int)}, "responses.*4 rows"),
    ],
)
def test_bad_shapes(
    mock: MockTrainServiceClient, batch: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    """A batch that the service would refuse is refused with the same class and the tensor's
    name."""
    tensors = {
        name: value for name, value in (batch["tensors"] | change).items() if value is not None
    }
    with pytest.raises(InvalidTensor, match=message) as caught:
        mock.compute_log_prob(tensors)
    assert caught.value.status == 422
    assert caught.value.details["tensor"] == next(iter(change))


def test_memory_does_not_grow(mock: MockTrainServiceClient, batch: dict[str, Any]) -> None:
    """Blocking calls leave nothing behind."""
    for _ in range(3):
        mock.update_actor(batch)
    assert mock._results == {}


def test_awaited(mock: MockTrainServiceClient, batch: dict[str, Any]) -> None:
    """submit and result in a trainer that is a coroutine."""

    async def trainer() -> list[dict[str, Any]]:
        jobs = await asyncio.gather(
            *(mock.submit_async("compute_log_prob", batch) for _ in range(3))
        )
        return await asyncio.gather(*(job.result_async(timeout=5) for job in jobs))

    assert [result["batch"]["old_log_probs"].shape for result in asyncio.run(trainer())] == [
        (4, 3)
    ] * 3
    with pytest.raises(UnknownOperation):
        asyncio.run(mock.submit_async("update_actr", batch))
