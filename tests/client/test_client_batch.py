"""Batches: the forms that are taken, what travels, and what is named as ignored."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from nexrl_client import HTTPTrainServiceClient, InvalidBatch, UnknownOperation, testing
from nexrl_contract.operations import OPERATIONS
from tensordict import TensorDict, lazy_stack


def send(
    batch: object, operation: str = "compute_log_prob", **params: Any
) -> tuple[testing.Recorded, dict[str, Any]]:
    """What is sent for a batch, and the result."""
    transport = testing.ScriptedTransport([testing.job_response("j1"), testing.result_response()])
    job = HTTPTrainServiceClient(transport=transport).submit(operation, batch, **params)  # type: ignore[arg-type]
    return transport.requests[0], job.result()


def described(request: testing.Recorded) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(request.frame().header.metadata["nexrl"])
    return content


def test_three_forms_are_one(batch: dict[str, Any]) -> None:
    """Both nested forms send the same bytes; a flat dict sends the same tensors."""
    other = {
        "batch": batch["tensors"],
        "non_tensor_batch": batch["values"],
        "meta_info": batch["metadata"],
    }
    nested, also, flat = (send(form)[0] for form in (batch, other, batch["tensors"]))
    assert nested.content == also.content
    assert described(nested) == {"version": 1, "metadata": {"temperature": 0.7}, "params": {}}
    assert described(flat)["metadata"] == {}
    for name in ("input_ids", "attention_mask", "loss_mask", "responses"):
        assert np.array_equal(nested.frame().numpy(name), batch["tensors"][name])
        assert np.array_equal(flat.frame().numpy(name), batch["tensors"][name])


def test_only_what_is_read_travels(batch: dict[str, Any]) -> None:
    """Tensors that the operation does not read, values and metadata that are no JSON stay, and are
    named: by dotted key."""
    batch["tensors"]["returns"] = np.zeros((4, 3))
    batch["tensors"]["uids"] = np.asarray(["a", "b", "c", "d"], object)
    batch["metadata"] |= {"std": {"groups": [0.5, torch.ones(2)], "step": 1}, "seen": {1, 2}}
    request, result = send(batch)
    assert set(request.frame().header.tensors) == {
        "input_ids",
        "attention_mask",
        "loss_mask",
        "responses",
    }
    assert set(result["meta_info"]["ignored"]) == {
        "prompts",
        "returns",
        "uids",
        "uid",
        "std.groups[1]",
        "seen",
    }
    assert described(request)["metadata"] == {"temperature": 0.7}


@pytest.mark.parametrize(
    "operation", [name for name, kind in OPERATIONS.items() if kind.takes_batch]
)
def test_each_operation_sends_its_own_tensors(operation: str) -> None:
    """Of a batch with every tensor there is, an operation sends exactly those it reads."""
    every = sorted({name for kind in OPERATIONS.values() for name in kind.reads})
    request, result = send({name: np.zeros((2, 3), np.float32) for name in every}, operation)
    assert set(request.frame().header.tensors) == set(OPERATIONS[operation].reads)
    assert set(result["meta_info"]["ignored"]) == set(every) - set(OPERATIONS[operation].reads)


def test_tensors_travel_as_they_are() -> None:
    """Dtypes are kept, torch and NumPy mix, and a view sends only its own elements."""
    big = torch.arange(4000).reshape(4, 1000)
    mask = torch.ones(4, 6, dtype=torch.bool, requires_grad=False)
    old = torch.zeros(4, 6, dtype=torch.bfloat16)
    request, _ = send(
        {
            "input_ids": big[:, 10:16],
            "attention_mask": mask,
            "loss_mask": np.ones((4, 6), np.int32),
            "old_log_probs": old,
        },
        "update_actor",
    )
    frame = request.frame()
    dtypes = {name: info.dtype for name, info in frame.header.tensors.items()}
    assert dtypes == {
        "input_ids": "I64",
        "attention_mask": "BOOL",
        "loss_mask": "I32",
        "old_log_probs": "BF16",
    }
    assert torch.equal(frame.torch("input_ids"), big[:, 10:16])
    assert len(request.content) < 2000


OLD = np.full((4, 3), -0.5, np.float32)
NOTHING = np.zeros((4, 1), np.float32)


@pytest.mark.parametrize(
    ("operation", "given", "sent", "ignored"),
    [
        ("update_actor", {"old_log_probs": NOTHING}, None, ["old_log_probs"]),
        ("update_actor", {"old_log_probs": torch.zeros(4, 1)}, None, ["old_log_probs"]),
        ("update_actor", {"old_log_probs": NOTHING - 1}, NOTHING - 1, []),
        ("update_actor", {"old_log_probs": OLD * 0}, OLD * 0, []),
        ("update_actor", {"old_student_log_probs": OLD}, None, ["old_student_log_probs"]),
        ("update_actor_with_distillation", {"old_student_log_probs": OLD}, OLD, []),
        (
            "update_actor_with_distillation",
            {"old_student_log_probs": torch.from_numpy(OLD)},
            OLD,
            [],
        ),
        (
            "update_actor_with_distillation",
            {"old_student_log_probs": NOTHING},
            None,
            ["old_student_log_probs"],
        ),
        (
            "update_actor_with_distillation",
            {"old_student_log_probs": OLD * 2, "old_log_probs": OLD},
            OLD,
            ["old_student_log_probs"],
        ),
    ],
)
def test_log_probs_that_were_not_computed(
    batch: dict[str, Any], operation: str, given: dict[str, Any], sent: Any, ignored: list[str]
) -> None:
    """Zeros of one column stand for nothing and are named; a distillation's own name of
    old_log_probs is understood."""
    for tensors in (
        batch["tensors"] | given,
        {"input_ids": batch["tensors"]["input_ids"][:, :4]} | given,
    ):
        request, result = send(tensors, operation)
        frame = request.frame()
        assert [name for name in result["meta_info"]["ignored"] if name != "prompts"] == ignored
        if sent is None:
            assert "old_log_probs" not in frame.header.tensors
        else:
            assert np.array_equal(frame.numpy("old_log_probs"), sent)


@pytest.mark.parametrize("responses", [{"responses": np.zeros((4, 1), int)}, {}])
def test_one_response_token_may_be_certain(responses: dict[str, Any]) -> None:
    """Where R is 1, zeros of one column are log-probabilities, and travel."""
    tensors = {"input_ids": np.zeros((4, 2), int), "old_log_probs": NOTHING} | responses
    request, result = send(tensors, "update_actor")
    assert np.array_equal(request.frame().numpy("old_log_probs"), NOTHING)
    assert result["meta_info"]["ignored"] == []


def test_arguments_that_are_the_defaults_stay(batch: dict[str, Any]) -> None:
    """A parameter travels only where it was given, under its own name; an old call sends what it
    always sent."""

    def params(method: str, **arguments: Any) -> Any:
        transport = testing.ScriptedTransport([testing.result_response()])
        getattr(HTTPTrainServiceClient(transport=transport), method)(batch, **arguments)
        assert transport.requests[0].path == f"/{method}"
        return described(transport.requests[0])["params"]

    methods = [name for name, kind in OPERATIONS.items() if kind.takes_batch]
    for method in methods:
        assert params(method) == {}
        assert params(method, explain=True) == {"explain": True}
    assert params("compute_log_prob", top_k=8) == {"top_k": 8}
    assert params("forward_backward", loss="linear") == {"loss": "linear"}
    distil = {"distillation_coeff": 0.0, "distillation_loss": "reverse_kl"}
    assert params("update_actor_with_distillation", **distil) == distil


def test_plan_comes_back(batch: dict[str, Any]) -> None:
    """What explain=True is answered with is in meta_info."""
    plan = {"rows": 4, "micro_batches": [[2, 2]]}
    transport = testing.ScriptedTransport([testing.result_response(meta_info={"plan": plan})])
    result = HTTPTrainServiceClient(transport=transport).update_actor(batch, explain=True)
    assert (result["meta_info"]["plan"], result["batch"]) == (plan, {})


def test_metadata_becomes_plain_json() -> None:
    """NumPy scalars are numbers, tuples lists, non-finite numbers their names."""
    metadata = {
        "temperature": np.float32(0.5),
        "global_step": np.int64(7),
        "global_token_num": (np.int32(1), 2),
        "flags": {"x": np.bool_(True), 3: None},
        "bad": [float("nan"), float("inf"), -float("inf")],
    }
    request, _ = send({"tensors": {"input_ids": np.zeros((1, 2), int)}, "metadata": metadata})
    assert described(request)["metadata"] == {
        "temperature": 0.5,
        "global_step": 7,
        "global_token_num": [1, 2],
        "flags": {"x": True, "3": None},
        "bad": ["NaN", "Infinity", "-Infinity"],
    }


def test_settings_in_the_metadata_may_be_tensors_of_one_number() -> None:
    """What changes the loss is never dropped: a 0-dimensional tensor of either kind is its
    number."""
    metadata = {
        "temperature": torch.tensor(0.5),
        "distillation_coeff": torch.tensor(2.0, dtype=torch.bfloat16, requires_grad=True),
        "entropy_coeff": np.asarray(0.25),
        "loss_agg_mode": np.str_("token-mean"),
    }
    request, result = send({"tensors": {"input_ids": np.zeros((1, 2), int)}, "metadata": metadata})
    sent = {
        "temperature": 0.5,
        "distillation_coeff": 2.0,
        "entropy_coeff": 0.25,
        "loss_agg_mode": "token-mean",
    }
    assert described(request)["metadata"] == sent
    assert result["meta_info"]["ignored"] == []


def nested(layout: Any) -> torch.Tensor:
    """Two rows of different lengths; torch warns that it may change what these are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


class Subclass(torch.Tensor):
    """Data of its own, and a name."""


PLAIN = torch.tensor([[3, 1, 4], [1, 5, 9]])


@pytest.mark.parametrize(
    "given",
    [
        PLAIN.tolist(),
        tuple(PLAIN),
        [np.asarray([3, 1, 4]), [1, 5, 9]],
        PLAIN.to(torch.uint16),
        PLAIN.to(torch.uint32),
        PLAIN.numpy().astype(np.uint64),
        PLAIN.as_subclass(Subclass),
        torch.nn.Parameter(PLAIN.float()),
        np.ma.masked_array(PLAIN.numpy()),
        np.asarray(PLAIN, ">i4"),
        PLAIN.t().contiguous().t(),
        TensorDict({"input_ids": PLAIN}, batch_size=2)["input_ids"],
    ],
)
def test_what_holds_the_same_numbers_is_the_same_tensor(given: Any) -> None:
    """Whatever people hold in their hands, the numbers arrive."""
    request, _ = send({"input_ids": given})
    assert request.frame().numpy("input_ids").tolist() == PLAIN.tolist()


@pytest.mark.parametrize("form", ["flat", "tensors", "batch"])
def test_a_tensordict_is_a_batch(form: str) -> None:
    """By its shape: tensordict is not imported."""
    held = TensorDict({"input_ids": PLAIN, "attention_mask": torch.ones_like(PLAIN)}, batch_size=2)
    request, _ = send(held if form == "flat" else {form: held})
    assert set(request.frame().header.tensors) == {"input_ids", "attention_mask"}


def test_what_a_tensordict_holds_besides_tensors_stays_with_the_trainer() -> None:
    """Text and dicts of tensors are named; rows that cannot be stacked are refused by their
    tensor."""
    inner = TensorDict({"x": PLAIN}, batch_size=2)
    request, result = send(
        TensorDict({"input_ids": PLAIN, "uid": ["a", "b"], "inner": inner}, batch_size=2)
    )
    assert set(request.frame().header.tensors) == {"input_ids"}
    assert set(result["meta_info"]["ignored"]) == {"uid", "inner"}
    rows = lazy_stack([TensorDict({"input_ids": PLAIN[0, :size]}) for size in (2, 3)])
    with pytest.raises(InvalidBatch, match="'input_ids' has rows of several shapes"):
        send(rows)


@pytest.mark.parametrize("given", [[0.5, 2], np.asarray([0.5, 2.0]), torch.tensor([[0.5], [2.0]])])
@pytest.mark.parametrize("section", ["tensors", "metadata"])
def test_a_temperature_of_each_row_is_a_tensor(given: Any, section: str) -> None:
    """Wherever it was given; a list among the metadata would be no number that ranks could divide
    by."""
    batch: dict[str, Any] = {
        "tensors": {"input_ids": np.zeros((2, 2), int)},
        "metadata": {"global_step": 3},
    }
    batch[section]["temperature"] = given
    request, result = send(batch)
    assert request.frame().numpy("temperature").tolist() == [0.5, 2.0]
    assert described(request)["metadata"] == {"global_step": 3}
    assert result["meta_info"]["ignored"] == []
    with pytest.raises(InvalidBatch, match="give one"):
        send({"tensors": {"temperature": np.ones(2)}, "metadata": {"temperature": [1.0, 1.0]}})


def test_params_travel_in_the_frame(batch: dict[str, Any]) -> None:
    """An operation's arguments go with its batch."""
    request, _ = send(batch, "forward_backward", loss="cross_entropy")
    assert described(request)["params"] == {"loss": "cross_entropy"}
    assert (request.method, request.path) == ("POST", "/forward_backward")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            {"input_ids": [[1, 2], [3]]},
            "'input_ids' has rows of several lengths: row 1 has 1 values, row 0 2; pad",
        ),
        ({"input_ids": [[[1], [2]], [[1], [2, 3]]]}, "'input_ids' cannot be made of these lists"),
        ({"tensors": {"input_ids": [["a", "b"]]}}, "'input_ids' holds what is no number"),
        ({"input_ids": [[1, None]]}, "'input_ids' holds what is no number"),
        ({"input_ids": np.ma.masked_array([[1, 2]], [[0, 1]])}, "'input_ids' is a masked array"),
        ({"input_ids": [np.ma.masked_array([1, 2], [0, 1])]}, "'input_ids' is a masked array"),
        ({"input_ids": [torch.ones(2, device="meta")]}, "'input_ids' is no dense tensor"),
        (
            {"input_ids": PLAIN, "temperature": nested(torch.strided)},
            "'temperature' is a nested tensor",
        ),
        (
            {"tensors": {}, "metadata": {"temperature": np.ma.masked}},
            "metadata.temperature is a masked value",
        ),
        ({"input_ids": nested(torch.strided)}, "'input_ids' is a nested tensor"),
        ({"input_ids": nested(torch.jagged)}, "'input_ids' is a nested tensor"),
        ({"input_ids": torch.ones(2, 2).to_sparse()}, "'input_ids' is no dense tensor"),
        ({"input_ids": torch.ones(2, 2, device="meta")}, "'input_ids' is no dense tensor"),
        ({"input_ids": np.ones((1, 2), np.longdouble)}, "'input_ids' has NumPy dtype"),
        ({"input_ids": np.asarray([[1], [2, 3]], object)}, "'input_ids'.*objects.*pad"),
        ({"input_ids": 3}, "'input_ids' is int"),
        ({"input_ids": np.zeros((1, 2), complex)}, "complex"),
        ({}, "is empty"),
        ([1], "the batch is list"),
        (None, "needs a batch"),
        ({"tensors": {}, "batch": {}}, "both 'tensors' and 'batch'"),
        ({"tensors": {}, "metdata": {"temperature": 1}}, "unknown keys metdata"),
        ({"batch": None, "meta_info": {}}, "no dict of tensors"),
        ({"tensors": {}, "values": [1]}, "'values' is list"),
        ({"tensors": {}, "metadata": {"entropy_coeff": torch.ones(1)}}, "entropy_coeff.*float"),
        (
            {"tensors": {}, "metadata": {"distillation_coeff": np.ones((1, 1))}},
            "distillation_coeff.*float",
        ),
        ({"tensors": {}, "metadata": {"entropy_coeff": {1.0}}}, "entropy_coeff.*float"),
        ({"tensors": {}, "metadata": {"loss_agg_mode": object()}}, "loss_agg_mode.*str"),
        ({"tensors": {}, "metadata": {"note": "x" * 2_000_000}}, "header"),
    ],
)
def test_what_cannot_be_sent(bad: object, message: str) -> None:
    """A batch that cannot be sent as it is meant is refused, saying what to give."""
    with pytest.raises(InvalidBatch, match=message) as caught:
        send(bad)
    assert isinstance(caught.value, ValueError)


def test_operations_that_take_no_batch(batch: dict[str, Any]) -> None:
    """A batch for one of them is refused rather than dropped; a misspelt operation gets the
    nearest."""
    client = HTTPTrainServiceClient(transport=testing.ScriptedTransport([]))
    with pytest.raises(InvalidBatch, match="barrier takes no batch"):
        client.submit("barrier", batch)
    with pytest.raises(UnknownOperation, match="did you mean 'update_actor'"):
        client.submit("update_actr", batch)
    with pytest.raises(ValueError, match="known are barrier"):
        client.submit("zzz")
    with pytest.raises(ValueError, match="argument lr is object"):
        client.submit("optim_step", lr=object())
