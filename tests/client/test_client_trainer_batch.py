"""Batch: from trajectories to what is sent."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nexrl_client import (
    Batch,
    HTTPTrainServiceClient,
    InvalidBatch,
    MockTrainServiceClient,
    testing,
)
from nexrl_contract.operations import OPERATIONS

PAD = 99


@dataclass
class Trajectory:
    """As trainers in the field have it."""

    tokens: list[int]
    loss_mask: list[int]
    reward: float = 0.0
    is_val: bool = False
    extra_fields: dict[str, Any] = field(default_factory=dict)


def trajectories() -> list[Any]:
    """Two turns with a tool's answer between, a short one, and one of which nothing is scored."""
    one = Trajectory(
        [1, 2, 3, 4, 5, 6],
        [0, 0, 1, 0, 1, 0],
        0.5,
        extra_fields={"group_id": "g", "temperature": 0.7},
    )
    one.extra_fields["logprobs"] = [None, -1.0, -2.0, -3.0, -4.0, -5.0]
    two = {
        "tokens": np.asarray([7, 8]),
        "loss_mask": [0, 1],
        "reward": 1,
        "logprobs": [-0.5],
        "group_id": "h",
    }
    three = SimpleNamespace(
        tokens=torch.tensor([9]), loss_mask=[0], reward=2.0, logprobs=[], temperature=0.7
    )
    return [one, two, three]


def test_from_trajectories() -> None:
    """Prompt left, response right, masks, positions, the reward on the last scored token, by
    hand."""
    batch = Batch.from_trajectories(trajectories(), PAD)
    expected = {
        "input_ids": [[1, 2, 3, 4, 5, 6], [PAD, 7, 8, PAD, PAD, PAD], [PAD, 9, PAD, PAD, PAD, PAD]],
        "attention_mask": [[1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]],
        "position_ids": [[0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 1, 1], [0] * 6],
        "loss_mask": [[0, 0, 1, 0, 1, 0], [0, 0, 1, 0, 0, 0], [0] * 6],
        "scoring_attention_mask": [[0, 0, 1, 0, 1, 0], [0, 0, 1, 0, 0, 0], [0] * 6],
        "responses": [[3, 4, 5, 6], [8, PAD, PAD, PAD], [PAD] * 4],
        "token_level_scores": [[0, 0, 0.5, 0], [1, 0, 0, 0], [0] * 4],
        "rollout_log_probs": [[-2, 0, -4, 0], [-0.5, 0, 0, 0], [0] * 4],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert {str(tensor.dtype) for tensor in batch.values()} == {
        "torch.int64",
        "torch.int32",
        "torch.float32",
    }
    assert batch.metadata == {"temperature": 0.7}
    assert batch.extras["group_id"] == ["g", "h", None]
    assert batch.extras["reward"] == [0.5, 1, 2.0]
    assert batch.extras["is_val"] == [False, None, None]
    assert batch.rows == 3


def test_widths_and_the_first_token() -> None:
    """Widths are at least those asked for; the first token is a prompt even where it was to be
    scored."""
    batch = Batch.from_trajectories(
        [{"tokens": [5, 6], "loss_mask": [1, 1]}], 0, prompt_length=2, response_length=3
    )
    assert batch["input_ids"].tolist() == [[0, 5, 6, 0, 0]]
    assert batch["loss_mask"].tolist() == [[0, 0, 1, 0, 0]]
    assert batch["responses"].tolist() == [[6, 0, 0]]
    assert "token_level_scores" not in batch and "rollout_log_probs" not in batch
    assert batch.metadata == {}


def test_several_temperatures_are_a_tensor() -> None:
    """Rows sampled at different temperatures are scored each at its own."""
    batch = Batch.from_trajectories([GOOD | {"temperature": 1.0}, GOOD | {"temperature": 0.5}], 0)
    assert batch["temperature"].tolist() == [1.0, 0.5]
    assert batch.metadata == {}


@pytest.mark.parametrize("logprobs", [[-9, -9, -1, -2, -3], [-1, -2, -3], [-1, -3]])
def test_log_probabilities_may_be_of_three_lengths(logprobs: list[float]) -> None:
    """Of all tokens, of those from the first scored one on, or of the scored ones."""
    batch = Batch.from_trajectories(
        [{"tokens": [1, 2, 3, 4, 5], "loss_mask": [0, 0, 1, 0, 1], "logprobs": logprobs}], 0
    )
    assert batch["rollout_log_probs"].tolist() == [[-1, 0, -3]]


def test_padding_weighs_nothing() -> None:
    """pad adds rows that no mask lets through, and leaves the batch itself as it is; the mock takes
    them."""
    batch = Batch.from_trajectories(trajectories(), PAD)
    padded = batch.pad(4)
    assert (batch.rows, padded.rows, padded.pad(4).rows, batch.pad(3).rows) == (3, 4, 4, 3)
    for name, tensor in padded.items():
        assert torch.equal(tensor[:3], batch[name])
        assert not tensor[3:].any()
    assert padded.extras["group_id"] == ["g", "h", None, None]
    assert padded.metadata == batch.metadata
    assert MockTrainServiceClient().compute_log_prob(padded)["batch"]["old_log_probs"].shape == (
        4,
        4,
    )
    assert Batch({"attention_mask": np.ones((3, 2), bool)}).pad(2)["attention_mask"].dtype == bool
    with pytest.raises(InvalidBatch, match="add attention_mask"):
        Batch({"input_ids": np.ones((3, 2), int)}).pad(2)


def test_to_nextrainer_batch() -> None:
    """The form of trainers in the field; extras are one object a row even where they are equally
    long lists."""
    batch = Batch(
        {"input_ids": np.zeros((2, 3), int)}, {"tokens": [[1, 2], [3, 4]]}, {"global_step": 4}
    )
    form = batch.to_nextrainer_batch()
    assert list(form) == ["batch", "non_tensor_batch", "meta_info"]
    assert form["batch"]["input_ids"] is batch["input_ids"]
    assert (form["non_tensor_batch"]["tokens"].shape, form["non_tensor_batch"]["tokens"][1]) == (
        (2,),
        [3, 4],
    )
    assert form["meta_info"] == {"global_step": 4}


@pytest.mark.parametrize(
    "operation", [name for name, kind in OPERATIONS.items() if kind.takes_batch]
)
def test_every_method_takes_it(operation: str) -> None:
    """A Batch is sent like the form that it gives: same bytes, metadata included, extras named as
    ignored."""
    batch = Batch.from_trajectories(trajectories(), PAD)
    for name in ("advantages", "old_log_probs", "teacher_log_probs", "returns"):
        batch[name] = torch.ones(3, 4)
    batch.metadata["global_step"] = 3
    sent = []
    for form in (batch, batch.to_nextrainer_batch()):
        transport = testing.ScriptedTransport([testing.result_response()])
        result = getattr(HTTPTrainServiceClient(transport=transport), operation)(form)
        assert {"group_id", "is_val", "reward"} < set(result["meta_info"]["ignored"])
        sent.append(transport.requests[0])
    assert sent[0].content == sent[1].content
    assert json.loads(sent[0].frame().header.metadata["nexrl"])["metadata"] == {
        "temperature": 0.7,
        "global_step": 3,
    }
    getattr(MockTrainServiceClient(), operation)(batch)


def test_a_mapping_of_tensors() -> None:
    """Tensors are added, read and removed by name; what is none, or has other rows, is refused at
    once."""
    batch = Batch({"input_ids": np.zeros((2, 3), int)})
    batch["advantages"] = torch.zeros(2)
    assert list(batch) == ["input_ids", "advantages"]
    del batch["advantages"]
    assert "advantages" not in batch and len(batch) == 1
    batch["input_ids"] = np.zeros((5, 3), int)
    assert repr(batch) == "Batch(input_ids [5, 3]; extras []; metadata {})"
    with pytest.raises(InvalidBatch, match=r"'advantages' has shape \[2\]; the batch has 5 rows"):
        batch["advantages"] = torch.zeros(2)
    batch["advantages"] = [0.0] * 5
    assert batch["advantages"].shape == (5,)
    for bad, message in (
        ({}, r"'advantages' is dict.*tensor"),
        ([[0.0], [0.0, 1.0]], "'advantages' has rows of several lengths: row 1"),
        (np.ma.masked_array(np.zeros(5), [0, 1, 0, 0, 0]), "'advantages' is a masked array"),
    ):
        with pytest.raises(InvalidBatch, match=message):
            batch["advantages"] = bad
    with pytest.raises(InvalidBatch, match="'uid' has 1 values for 5 rows"):
        Batch(batch, {"uid": ["a"]})


GOOD = {"tokens": [1, 2], "loss_mask": [0, 1]}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no trajectories"),
        ([GOOD, {"tokens": [1]}], "trajectory 1 has no loss_mask; it has tokens"),
        (
            [GOOD | {"loss_mask": [1]}],
            r"loss_mask of trajectory 0 has shape \[1\], its tokens \[2\]",
        ),
        ([GOOD | {"tokens": []}], "tokens of trajectory 0.*at least one"),
        ([GOOD | {"tokens": [1.5, 2.5]}], "tokens of trajectory 0.*integers"),
        ([GOOD, GOOD | {"reward": 1.0}], "trajectory 0 has no reward, others have"),
        ([GOOD | {"logprobs": [-1.0]}, GOOD], "trajectory 1 has no logprobs, others have"),
        ([GOOD | {"logprobs": [-1.0, -1.0, -1.0]}], "logprobs of trajectory 0.*2 tokens.*1 scored"),
        (
            [GOOD | {"temperature": 1.0}, GOOD | {"temperature": 0.5}, GOOD],
            "trajectory 2 has no temperature",
        ),
        ([3], "trajectory 0 is int"),
    ],
)
def test_what_is_no_trajectory(given: list[Any], message: str) -> None:
    """A trajectory that cannot be a row is refused with its number and what it lacks."""
    with pytest.raises(InvalidBatch, match=message):
        Batch.from_trajectories(given, 0)


def test_without_torch() -> None:
    """Where torch is not installed, tensors are of NumPy, and everything works."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np; from nexrl_client import Batch, MockTrainServiceClient, "
        "group_relative_advantages\n"
        "b = Batch.from_trajectories([{'tokens': [1, 2], 'loss_mask': [0, 1], 'reward': 1}] * 2, "
        "0).pad(3)\n"
        "b['advantages'] = group_relative_advantages(b['token_level_scores'].sum(1), [1, 1, 2], "
        "b['loss_mask'][:, -1:])\n"
        "assert isinstance(b['input_ids'], np.ndarray) and b['advantages'].dtype == np.float32\n"
        "MockTrainServiceClient().update_actor(b)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_masked_tokens_are_not_read_as_values() -> None:
    """A masked array is refused where a batch is made of it, as where it is sent."""
    with pytest.raises(InvalidBatch, match="masked"):
        Batch.from_trajectories(
            [{"tokens": np.ma.masked_array([1, 2], [0, 1]), "loss_mask": [0, 1]}], 0
        )
