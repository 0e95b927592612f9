"""`explain=True` through the whole service: the plan comes back, and nothing has run."""

from __future__ import annotations

import pytest
from nexrl_client import HTTPTrainServiceClient, InvalidTensor

from tests.helpers.service import fingerprint, make_batch


@pytest.mark.parametrize("operation", ["update_actor", "forward_backward", "compute_log_prob"])
def test_a_plan_comes_back_and_nothing_has_run(
    student: HTTPTrainServiceClient, operation: str
) -> None:
    batch = make_batch(rows=5)
    before = fingerprint(student), student.worker_info()["info"]["optimizer_steps"]

    result = getattr(student, operation)(batch, explain=True)

    plan = result["meta_info"]["plan"]
    assert result["batch"] == {} and result["metrics"] == {}
    assert (plan["operation"], plan["rows"], plan["world_size"]) == (operation, 5, 2)
    assert sum(plan["rows_per_rank"]) == 5
    assert plan["tokens"] == int(batch["tensors"]["attention_mask"].sum())
    assert 0.0 <= plan["padding_share"] < 1.0 and plan["peak_memory_mib"] > 100
    student.optim_step(discard=True)  # no gradient is pending, so nothing is dropped that mattered
    assert (fingerprint(student), student.worker_info()["info"]["optimizer_steps"]) == before


def test_what_would_be_refused_is_refused_in_a_plan_too(student: HTTPTrainServiceClient) -> None:
    batch = make_batch()
    batch["tensors"]["advantages"] = batch["tensors"]["advantages"][:3]

    with pytest.raises(InvalidTensor):
        student.update_actor(batch, explain=True)
