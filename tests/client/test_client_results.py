"""Results: what trainers find in them, and the helpers for tensors in JSON."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from nexrl_client import (
    HTTPTrainServiceClient,
    InvalidAnswer,
    Response,
    data_to_tensor,
    tensor_to_data,
    testing,
)
from nexrl_contract.names import FRAME_TYPE
from tensor_codec import CodecError


def result_of(answer: Response, batch: dict[str, Any]) -> dict[str, Any]:
    return HTTPTrainServiceClient(transport=testing.ScriptedTransport([answer])).compute_log_prob(
        batch
    )


def test_frame_result(batch: dict[str, Any]) -> None:
    """Tensors are torch's, writable, and views of the one buffer that was received."""
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    answer = testing.result_response(
        {"old_log_probs": values}, {"tokens": 12}, {"job_id": "j1", "ignored": ["x"]}
    )
    result = result_of(answer, batch)
    tensor = result["batch"]["old_log_probs"]
    assert isinstance(tensor, torch.Tensor)
    assert torch.equal(tensor, torch.from_numpy(values))
    tensor[0, 0] = 99
    assert np.frombuffer(answer.body, np.float32, 12, len(answer.body) - 48)[0] == 99
    assert result["metrics"] == {"tokens": 12}
    assert result["meta_info"]["metrics"] is result["metrics"]
    assert result["meta_info"]["job_id"] == "j1"
    assert result["meta_info"]["ignored"] == ["prompts", "uid", "x"]


def test_json_result(batch: dict[str, Any]) -> None:
    """The JSON form of a result means the same."""
    body = {
        "batch": {"old_log_probs": tensor_to_data(np.ones((4, 3), np.float32))},
        "metrics": {
            "a": "NaN",
            "b": ["Infinity", 1.5, "-Infinity"],
            "c": {"d": "NaN"},
            "e": "text",
        },
        "meta_info": {"job_id": "NaN", "metrics": {"a": "NaN"}},
    }
    result = result_of(testing.json_response(body), batch)
    assert torch.equal(result["batch"]["old_log_probs"], torch.ones(4, 3))
    assert math.isnan(result["metrics"]["a"])
    assert result["metrics"]["b"] == [math.inf, 1.5, -math.inf]
    assert math.isnan(result["metrics"]["c"]["d"])
    assert result["metrics"]["e"] == "text"
    assert result["meta_info"]["metrics"] is result["metrics"]
    assert result["meta_info"]["job_id"] == "NaN"


def test_other_results_are_their_json() -> None:
    """Operations without a batch give what the service said, with floats in metrics."""
    said = {"status": "success", "step_applied": False, "metrics": {"actor/grad_norm": "NaN"}}
    client = HTTPTrainServiceClient(
        transport=testing.ScriptedTransport([testing.json_response(said)])
    )
    result = client.optim_step()
    assert result["step_applied"] is False
    assert math.isnan(result["metrics"]["actor/grad_norm"])


@pytest.mark.parametrize(
    "answer",
    [
        Response(200, {"content-type": "text/html"}, memoryview(b"<html>hello</html>")),
        Response(200, {"content-type": FRAME_TYPE}, memoryview(b"not a frame")),
        testing.json_response([1, 2]),
        testing.json_response({"batch": {"x": {"data": "!"}}, "metrics": {}, "meta_info": {}}),
        testing.json_response({}, 202),
        Response(307, {"location": "http://elsewhere/"}, memoryview(b"")),
    ],
)
def test_answers_of_something_else(answer: Response, batch: dict[str, Any]) -> None:
    """An answer that is not the service's is named as such, and nothing of a codec or JSON library
    leaks."""
    with pytest.raises(InvalidAnswer):
        result_of(answer, batch)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6).reshape(2, 3),
        torch.ones(2, dtype=torch.bfloat16),
        torch.tensor(3.5),
        torch.empty(0, 4),
    ],
)
def test_tensor_to_data_and_back(tensor: torch.Tensor) -> None:
    """Tensors survive JSON, as writable memory of their own."""
    data = tensor_to_data(tensor)
    assert set(data) == {"data", "shape", "dtype", "encoding"}
    back = data_to_tensor(json.loads(json.dumps(data)))
    assert back.dtype == tensor.dtype
    assert torch.equal(back, tensor)
    back += 1


def test_broken_data() -> None:
    """What is no tensor in JSON is a ValueError of the codec."""
    with pytest.raises(CodecError):
        data_to_tensor({"data": "AAAA", "shape": [1], "dtype": "int64", "encoding": "base64"})


def test_without_torch() -> None:
    """Where torch is not installed results are writable NumPy arrays."""
    code = """
import sys
sys.modules["torch"] = None
import numpy as np
from nexrl_client import HTTPTrainServiceClient, MockTrainServiceClient
from nexrl_client import data_to_tensor, tensor_to_data, testing
batch = {"input_ids": np.zeros((2, 3), int)}
answer = testing.result_response({"old_log_probs": np.zeros((2, 2), np.float32)})
client = HTTPTrainServiceClient(transport=testing.ScriptedTransport([answer]))
for made in (client, MockTrainServiceClient()):
    array = made.compute_log_prob(batch)["batch"]["old_log_probs"]
    assert type(array) is np.ndarray and array.shape == (2, 2) and array.dtype == np.float32
    array += 1
back = data_to_tensor(tensor_to_data(np.arange(3)))
back += 1
assert back.tolist() == [1, 2, 3]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
