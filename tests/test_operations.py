"""The table of operations is the truth: the ranks, the client and the mock have each of its rows,
and nothing else."""

from __future__ import annotations

import inspect

import pytest
from nexrl_client import MockTrainServiceClient, TrainServiceClient
from nexrl_contract.losses import LOSSES
from nexrl_contract.operations import OPERATIONS
from nexrl_worker.rank.operations import IMPLEMENTED
from nexrl_worker.training.inference import INFERENCE
from nexrl_worker.training.losses.formulas import FUNCTIONS

NO_OPERATIONS = {
    "health_check",
    "get_models",
    "worker_info",
    "actor_context",
    "submit",
    "submit_async",
}


def test_the_ranks_implement_each_row_and_no_other() -> None:
    assert IMPLEMENTED.keys() == {name for name, row in OPERATIONS.items() if row.by_ranks}
    assert INFERENCE.keys() == {
        name for name, row in OPERATIONS.items() if row.takes_batch and not row.trains
    }
    assert FUNCTIONS.keys() == LOSSES.keys()


def test_the_client_has_a_method_for_each_row_and_no_other() -> None:
    methods = {
        name
        for name, value in vars(TrainServiceClient).items()
        if callable(value) and name[0] != "_"
    }
    assert methods - NO_OPERATIONS == OPERATIONS.keys()


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_clients_method_takes_the_rows_arguments(name: str) -> None:
    """With the same defaults, so that leaving one out means the same on both sides."""
    row = OPERATIONS[name]
    for client in (TrainServiceClient, MockTrainServiceClient):
        taken = dict(inspect.signature(getattr(client, name)).parameters)
        del taken["self"]
        assert ("batch" in taken) == row.takes_batch
        taken.pop("batch", None)
        assert taken.keys() == row.params.model_fields.keys()
        for argument, parameter in taken.items():
            field = row.params.model_fields[argument]
            if (
                name != "initialize_worker"
            ):  # whose role None means the configuration's, else "actor"
                assert (parameter.default is parameter.empty) == field.is_required(), argument
                assert field.is_required() or parameter.default == field.default, argument
