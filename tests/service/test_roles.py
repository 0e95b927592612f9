"""Critic, reward, reference and teacher groups through the client: their numbers are transformers'
own, their limits are said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from nexrl_client import (
    HTTPTrainServiceClient,
    InvalidTensor,
    InvalidValue,
    RoleUnsupported,
    StatusError,
    data_to_tensor,
    tensor_to_data,
)
from nexrl_contract.operations import OPERATIONS, ROLES
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Qwen2Config,
)

from tests.helpers.service import VOCABULARY, StartGroup, fingerprint, make_batch
from tests.helpers.stack import Stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def _config(**more: Any) -> Qwen2Config:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return Qwen2Config(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes, **more)


@pytest.fixture(scope="module")
def critic(
    start_group: StartGroup, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HTTPTrainServiceClient]:
    """From a folder whose head is random, so that values differ."""
    folder = tmp_path_factory.mktemp("critic") / "model"
    torch.manual_seed(1)
    AutoModelForTokenClassification.from_config(_config(num_labels=1)).save_pretrained(folder)
    client = start_group("critic", role="critic", model={"path": str(folder)})
    yield client
    client.destroy()


@pytest.fixture(scope="module")
def reward(start_group: StartGroup, reward_folder: Path) -> Iterator[HTTPTrainServiceClient]:
    client = start_group("reward", role="reward", model={"path": str(reward_folder)})
    yield client
    client.destroy()


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward") / "model"
    torch.manual_seed(2)
    AutoModelForSequenceClassification.from_config(_config(num_labels=1)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(start_group: StartGroup) -> Iterator[HTTPTrainServiceClient]:
    client = start_group("reference", role="ref")
    yield client
    client.destroy()


def _positions(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    mask = tensors["attention_mask"]
    return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def _exported(client: HTTPTrainServiceClient, stack: Stack, path: str) -> Path:
    client.save_checkpoint(path, saved_fully_shared_ckpt=False, remove_previous_ckpt=False)
    return stack.data / path


def _values_batch(rows: int = 7) -> dict[str, Any]:
    """R = 6 responses of which some are not attended or not scored; returns that the critic does
    not foresee."""
    batch = make_batch(rows=rows, seed=9)
    batch["tensors"]["returns"] = torch.randn(rows, 6, generator=torch.Generator().manual_seed(3))
    return batch


def test_values_are_the_heads_at_the_position_before_each_token(
    critic: HTTPTrainServiceClient, stack: Stack
) -> None:
    """values[:, k] is transformers' own token classifier at position S-R-1+k, in row order,
    float32."""
    tensors = make_batch(rows=7)["tensors"]
    model = AutoModelForTokenClassification.from_pretrained(
        _exported(critic, stack, "roles/critic")
    )
    with torch.no_grad():
        theirs = model(tensors["input_ids"], **_positions(tensors)).logits[..., 0]

    ours = critic.compute_values({"tensors": tensors})["batch"]["values"]

    assert ours.shape == (7, 6)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs[:, 10 - 6 - 1 : -1], atol=1e-5, rtol=0)


def test_a_critic_learns_its_returns(critic: HTTPTrainServiceClient) -> None:
    """The first vf_loss is the formula's; twenty updates on one batch halve it at least, and each
    is a new weight version."""
    batch = _values_batch()
    tensors = batch["tensors"]
    scored = (tensors["attention_mask"] * tensors["loss_mask"])[:, -6:].bool()
    values = critic.compute_values(batch)["batch"]["values"]
    formula = 0.5 * (values - tensors["returns"])[scored].square().mean()

    results = [critic.update_critic(batch) for _ in range(20)]

    losses = [result["metrics"]["critic/vf_loss"] for result in results]
    assert losses[0] == pytest.approx(float(formula), rel=1e-5)
    assert losses[-1] < 0.5 * losses[0]
    first, last = results[0], results[-1]
    assert last["meta_info"]["weight_version"] == first["meta_info"]["weight_version"] + 19
    assert (
        last["metrics"]["critic/explained_variance"] > first["metrics"]["critic/explained_variance"]
    )
    assert first["metrics"]["critic/grad_norm"] > 0


def test_values_far_from_the_old_ones_are_clipped(critic: HTTPTrainServiceClient) -> None:
    """With values of the batch far away, the larger of both squares counts: 0.5 max((v-ret)^2,
    (clip(v)-ret)^2)."""
    batch = _values_batch()
    tensors = batch["tensors"]
    values = critic.compute_values(batch)["batch"]["values"]
    old = values + 3.0
    scored = (tensors["attention_mask"] * tensors["loss_mask"])[:, -6:].bool()
    clipped = torch.maximum(torch.minimum(values, old + 0.5), old - 0.5)
    squares = torch.maximum((values - tensors["returns"]) ** 2, (clipped - tensors["returns"]) ** 2)

    metrics = critic.update_critic({"tensors": {**tensors, "values": old}})["metrics"]

    assert metrics["critic/vf_loss"] == pytest.approx(float(0.5 * squares[scored].mean()), rel=1e-5)
    assert 0 < metrics["critic/vf_clipfrac"] <= 1


def test_a_critics_checkpoint_loads_at_another_world_size_and_in_transformers(
    critic: HTTPTrainServiceClient, start_group: StartGroup
) -> None:
    batch = _values_batch()
    critic.save_checkpoint("roles/critic_step", global_step=3)
    values = critic.compute_values(batch)["batch"]["values"]

    pair = start_group("pair-of-critics", role="critic", world_size=2)
    fresh = pair.compute_values(batch)["batch"]["values"]
    loaded = pair.load_checkpoint("roles/critic_step")
    again = pair.compute_values(batch)["batch"]["values"]
    folder = Path(pair.convert_checkpoint_to_huggingface("roles/critic_step")["path"])
    after = [client.update_critic(batch)["metrics"]["critic/vf_loss"] for client in (critic, pair)]
    moved = [client.compute_values(batch)["batch"]["values"] for client in (critic, pair)]
    pair.destroy()

    assert torch.equal(fresh, torch.zeros(7, 6)), (
        "a critic made of a language model's folder starts at zero"
    )
    assert (loaded["optimizer"], loaded["global_step"]) == ("restored", 3)
    torch.testing.assert_close(again, values, atol=1e-5, rtol=0)
    assert after[0] == pytest.approx(after[1], rel=1e-4)
    torch.testing.assert_close(moved[0], moved[1], atol=1e-4, rtol=0)
    model, report = AutoModelForTokenClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert model.config.num_labels == 1
    with torch.no_grad():
        theirs = model(batch["tensors"]["input_ids"], **_positions(batch["tensors"])).logits[
            :, 3:-1, 0
        ]
    torch.testing.assert_close(theirs, values, atol=1e-5, rtol=0)


def test_rewards_are_the_classifiers_at_the_last_attended_position(
    reward: HTTPTrainServiceClient, reward_folder: Path
) -> None:
    """Rows padded left, right and not at all; what stands under the padding does not matter."""
    tensors = make_batch(rows=4)["tensors"]
    tensors["attention_mask"][3, -4:] = 0
    model = AutoModelForSequenceClassification.from_pretrained(reward_folder)
    theirs = []
    for row in range(4):
        own = tensors["input_ids"][row][tensors["attention_mask"][row].bool()]
        head = model.score(model.model(own[None]).last_hidden_state[:, -1])
        theirs.append(float(head.detach()))

    ours = reward.compute_rewards({"tensors": tensors})["batch"]["rewards"]

    assert ours.shape == (4,)
    torch.testing.assert_close(ours, torch.tensor(theirs), atol=1e-5, rtol=0)


def test_a_reference_answers_as_its_folder_says_and_a_json_caller_gets_the_same(
    reference: HTTPTrainServiceClient, stack: Stack, tiny_model: Path
) -> None:
    tensors = make_batch(rows=3)["tensors"]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        logits = model(tensors["input_ids"], **_positions(tensors)).logits
    theirs = torch.log_softmax(logits[:, :-1], -1).gather(-1, tensors["input_ids"][:, 1:, None])[
        ..., 0
    ][:, -6:]

    current = reference.compute_log_prob({"tensors": tensors})["batch"]["old_log_probs"]
    frozen = reference.compute_ref_log_prob({"tensors": tensors})["batch"]["ref_log_prob"]

    torch.testing.assert_close(current, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(frozen, current, atol=1e-6, rtol=0)


@pytest.mark.parametrize("verb", ["compute_values", "compute_rewards"])
def test_json_callers_reach_the_heads_too(
    critic: HTTPTrainServiceClient, reward: HTTPTrainServiceClient, stack: Stack, verb: str
) -> None:
    client = critic if verb == "compute_values" else reward
    tensors = make_batch(rows=3)["tensors"]
    body = {
        "tensors": {
            name: tensor_to_data(tensors[name])
            for name in ("input_ids", "attention_mask", "responses")
        }
    }
    answer = requests.post(
        f"{stack.url}/{verb}?identifier={client.identifier}", json=body, timeout=60
    )

    assert answer.status_code == 200, answer.text
    name = verb.removeprefix("compute_")
    assert torch.equal(
        data_to_tensor(answer.json()["batch"][name]),
        getattr(client, verb)({"tensors": tensors})["batch"][name],
    )


_PARAMS: dict[str, dict[str, Any]] = {
    "save_checkpoint": {"local_path": "x"},
    "load_checkpoint": {"path": "x"},
    "convert_checkpoint_to_huggingface": {"local_path": "x"},
}
_LACKING = [
    (role, name)
    for role in ROLES
    for name, operation in OPERATIONS.items()
    if role not in operation.roles
]


@pytest.mark.parametrize(("role", "operation"), _LACKING)
def test_what_a_role_lacks_is_said_and_changes_nothing(
    role: str,
    operation: str,
    student: HTTPTrainServiceClient,
    critic: HTTPTrainServiceClient,
    reward: HTTPTrainServiceClient,
    reference: HTTPTrainServiceClient,
    teacher: HTTPTrainServiceClient,
) -> None:
    """409 ROLE_UNSUPPORTED names role and operation, whatever the batch: it is judged before the
    batch."""
    groups = {
        "actor": student,
        "critic": critic,
        "reward": reward,
        "ref": reference,
        "teacher": teacher,
    }
    batch = make_batch() if OPERATIONS[operation].takes_batch else None

    with pytest.raises(RoleUnsupported, match=operation) as caught:
        groups[role].submit(operation, batch, **_PARAMS.get(operation, {})).result(60)

    assert caught.value.status == 409
    assert role in str(caught.value)


@pytest.mark.parametrize("role", ["ref", "teacher", "reward"])
def test_a_forward_role_holds_no_optimizer(
    role: str,
    reference: HTTPTrainServiceClient,
    teacher: HTTPTrainServiceClient,
    reward: HTTPTrainServiceClient,
) -> None:
    """A full save of one has the weights, and not one tensor of an optimizer."""
    client = {"ref": reference, "teacher": teacher, "reward": reward}[role]
    saved = Path(client.save_checkpoint(f"roles/forward-{role}", global_step=1)["path"])

    assert any(file.name.startswith("model.rank0") for file in saved.iterdir())
    assert [name for file in saved.glob("optim.*.safetensors") for name in load_file(file)] == []


def _without(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def _with(name: str, value: Any) -> Any:
    return lambda tensors: tensors.__setitem__(name, value)


@pytest.mark.parametrize(
    ("spoil", "error", "tensor"),
    [
        (_without("returns"), InvalidTensor, "returns"),
        (_with("returns", torch.zeros(7, 5)), InvalidTensor, "returns"),
        (_with("returns", torch.zeros(7)), InvalidTensor, "returns"),
        (_with("values", torch.zeros(7, 6, dtype=torch.bool)), InvalidTensor, "values"),
        (_with("values", torch.full((7, 6), torch.nan)), InvalidValue, "values"),
        (_with("returns", torch.full((7, 6), torch.inf)), InvalidValue, "returns"),
    ],
)
def test_a_bad_batch_for_a_critic_is_named_and_changes_nothing(
    critic: HTTPTrainServiceClient, spoil: Any, error: type[StatusError], tensor: str
) -> None:
    before = fingerprint(critic)
    batch = _values_batch()
    spoil(batch["tensors"])

    with pytest.raises(error, match=tensor) as caught:
        critic.update_critic(batch)

    assert caught.value.status == 422
    assert caught.value.details["tensor"] == tensor
    assert fingerprint(critic) == before
