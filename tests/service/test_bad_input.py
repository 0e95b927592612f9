"""What bad input gets: a clear 4xx, and not one bit of the weights changed; the group goes on."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from nexrl_client import (
    GroupNotFound,
    GroupNotReady,
    HTTPTrainServiceClient,
    InvalidConfig,
    InvalidTensor,
    InvalidValue,
    NoSuchSlots,
    StatusError,
    tensor_to_data,
)

from tests.helpers.service import fingerprint, make_batch
from tests.helpers.stack import Stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

Spoil = Callable[[dict[str, Any]], None]


def _set(name: str, value: Any) -> Spoil:
    return lambda tensors: tensors.__setitem__(name, value)


def _poke(name: str, place: tuple[int, ...], value: float) -> Spoil:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name][place] = value

    return spoil


@pytest.mark.parametrize(
    ("spoil", "error", "tensor"),
    [
        (lambda tensors: tensors.pop("advantages"), InvalidTensor, "advantages"),
        (lambda tensors: tensors.pop("input_ids"), Exception, "input_ids"),
        (_set("advantages", torch.zeros(5, 3)), InvalidTensor, "advantages"),
        (_set("advantages", torch.zeros(4)), InvalidTensor, "advantages"),
        (_set("input_ids", torch.zeros(5, 10)), InvalidTensor, "input_ids"),
        (
            _set("attention_mask", torch.ones(5, 9, dtype=torch.int64)),
            InvalidTensor,
            "attention_mask",
        ),
        (
            _set("old_log_probs", torch.zeros(5, 6, dtype=torch.bool)),
            InvalidTensor,
            "old_log_probs",
        ),
        (_poke("input_ids", (3, 4), 64), InvalidValue, "input_ids"),
        (_poke("input_ids", (0, 4), -1), InvalidValue, "input_ids"),
        (_poke("advantages", (2,), math.nan), InvalidValue, "advantages"),
        (_poke("advantages", (4,), math.inf), InvalidValue, "advantages"),
        (_poke("attention_mask", (1, 5), 2), InvalidValue, "attention_mask"),
        (_poke("responses", (2, 1), 63), InvalidValue, "responses"),
    ],
)
def test_a_bad_batch_is_named_and_changes_nothing(
    student: HTTPTrainServiceClient, spoil: Spoil, error: type[Exception], tensor: str
) -> None:
    before = fingerprint(student)
    batch = make_batch()
    spoil(batch["tensors"])

    with pytest.raises(error, match=tensor):
        student.update_actor(batch)

    assert fingerprint(student) == before
    assert student.compute_log_prob(make_batch())["batch"]["old_log_probs"].shape == (5, 6)


def test_a_value_that_is_refused_names_row_and_range(student: HTTPTrainServiceClient) -> None:
    batch = make_batch()
    _poke("input_ids", (3, 4), 99)(batch["tensors"])

    with pytest.raises(InvalidValue) as caught:
        student.update_actor(batch)

    assert caught.value.status == 422
    assert (caught.value.details["tensor"], caught.value.details["row"]) == ("input_ids", 3)


def test_what_stands_under_the_mask_does_not_matter(student: HTTPTrainServiceClient) -> None:
    """NaN under a masked token and pad ids beyond the vocabulary are legal and leak nowhere."""
    batch = make_batch()
    clean = student.compute_log_prob(batch)["batch"]["old_log_probs"]
    tensors = batch["tensors"]
    tensors["input_ids"] = torch.where(
        tensors["attention_mask"].bool(), tensors["input_ids"], torch.tensor(10**6)
    )
    scored = (tensors["attention_mask"] * tensors["loss_mask"])[:, -6:].bool()
    tensors["old_log_probs"] = torch.where(scored, clean, torch.tensor(math.nan))

    assert torch.equal(
        student.compute_log_prob(batch)["batch"]["old_log_probs"][scored], clean[scored]
    )
    metrics = student.update_actor(batch)["metrics"]

    assert math.isfinite(metrics["actor/loss"])
    assert math.isfinite(metrics["actor/grad_norm"])


def test_a_batch_with_nothing_to_learn_takes_no_step(student: HTTPTrainServiceClient) -> None:
    before = fingerprint(student)
    batch = make_batch()
    batch["tensors"]["loss_mask"] = torch.zeros(5, 10, dtype=torch.int64)

    metrics = student.update_actor(batch)["metrics"]

    assert metrics["step_applied"] is False
    assert fingerprint(student) == before


def _post(stack: Stack, path: str, **arguments: Any) -> tuple[int, dict[str, Any]]:
    answer = requests.post(f"{stack.url}{path}", timeout=60, **arguments)
    return answer.status_code, answer.json()["error"]


def test_rubbish_on_the_wire_is_refused_in_one_shape(
    student: HTTPTrainServiceClient, stack: Stack
) -> None:
    frame = {"Content-Type": "application/vnd.nexrl.frame"}
    good = tensor_to_data(torch.zeros(2, 4, dtype=torch.int64))
    path = "/compute_log_prob?identifier=student"
    lying = (2**40).to_bytes(8, "little") + b"{}"
    truncated = (70).to_bytes(
        8, "little"
    ) + b'{"input_ids":{"dtype":"I64","shape":[2,4],"data_offsets":[0,64]}}     '

    seen = {
        "base64": _post(stack, path, json={"tensors": {"input_ids": {**good, "data": "!!!"}}}),
        "shape": _post(stack, path, json={"tensors": {"input_ids": {**good, "shape": [3, 4]}}}),
        "json": _post(stack, path, data=b"{", headers={"Content-Type": "application/json"}),
        "header": _post(stack, path, data=lying, headers=frame),
        "truncated": _post(stack, path, data=truncated + b"\0" * 10, headers=frame),
        "type": _post(stack, path, data=b"x", headers={"Content-Type": "text/plain"}),
        "encoding": _post(stack, path, data=b"x", headers={**frame, "Content-Encoding": "gzip"}),
    }

    assert {name: (status, error["code"]) for name, (status, error) in seen.items()} == {
        "base64": (400, "MALFORMED"),
        "shape": (400, "MALFORMED"),
        "json": (400, "MALFORMED"),
        "header": (400, "MALFORMED"),
        "truncated": (400, "MALFORMED"),
        "type": (415, "UNSUPPORTED_TYPE"),
        "encoding": (415, "UNSUPPORTED_TYPE"),
    }
    assert not any(
        "Traceback" in error["message"] or ".py" in error["message"] for _, error in seen.values()
    )


def test_a_group_that_is_not_there_or_not_ready_is_named(
    student: HTTPTrainServiceClient, stack: Stack, tiny_model: Any
) -> None:
    with pytest.raises(GroupNotFound, match="nobody"):
        HTTPTrainServiceClient(stack.url, "nobody").update_actor(make_batch())
    bare = HTTPTrainServiceClient(stack.url, "bare")
    bare.initialize_worker(
        config_dict={"actor": {"model": {"path": str(tiny_model)}}}, world_size=1
    )
    with pytest.raises(GroupNotReady, match="init_model"):
        bare.update_actor(make_batch())
    bare.destroy()
    with pytest.raises(GroupNotReady, match="destroyed"):
        bare.barrier()


@pytest.mark.parametrize(
    ("actor", "key"),
    [
        ({"optim": {"learning_rate": 1e-3}}, "actor.optim.lr"),
        ({"model": {"path": "/nowhere"}}, "actor.model.path"),
        ({"optim": {"lr": "${LR}"}}, "actor.optim.lr"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_before_anything_starts(
    stack: Stack, student: HTTPTrainServiceClient, tiny_model: Any, actor: dict[str, Any], key: str
) -> None:
    client = HTTPTrainServiceClient(stack.url, "wrong")

    with pytest.raises((InvalidConfig, StatusError), match=key.replace(".", r"\.")) as caught:
        client.initialize_worker(
            config_dict={"actor": {"model": {"path": str(tiny_model)}, **actor}}, world_size=1
        )

    assert getattr(caught.value, "status", None) == 422
    assert "wrong" not in client.get_models()["identifiers"]


def test_weights_that_cannot_be_read_are_refused_and_cost_no_group(
    stack: Stack, student: HTTPTrainServiceClient, tiny_model: Path, tmp_path: Path
) -> None:
    """Before the ranks start, which leaves the name free; where they are damaged later, by
    init_model."""
    folder = shutil.copytree(tiny_model, tmp_path / "broken")
    config = {"actor": {"model": {"path": str(folder)}}}
    client = HTTPTrainServiceClient(stack.url, "broken")
    (folder / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(InvalidConfig, match=r"model\.safetensors"):
        client.initialize_worker(config_dict=config, world_size=2)
    shutil.copy(tiny_model / "model.safetensors", folder)
    assert client.initialize_worker(config_dict=config, world_size=2)["already"] is False
    (folder / "model.safetensors").write_bytes(b"not safetensors at all")

    with pytest.raises(InvalidConfig, match=r"model\.safetensors"):
        client.init_model()

    assert client.barrier()["status"] == "success"
    shutil.copy(tiny_model / "model.safetensors", folder)
    assert client.init_model()["already"] is False
    client.destroy()


def test_more_ranks_than_any_agent_has_is_refused(
    stack: Stack, student: HTTPTrainServiceClient, tiny_model: Any
) -> None:
    with pytest.raises(NoSuchSlots, match="the largest agent has 8 slots"):
        HTTPTrainServiceClient(stack.url, "huge").initialize_worker(
            config_dict={"actor": {"model": {"path": str(tiny_model)}}}, world_size=100
        )
