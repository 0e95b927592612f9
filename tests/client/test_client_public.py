"""What is public, and what stays so: trainers depend on it."""

from __future__ import annotations

import inspect
import subprocess
import sys
import types
from collections.abc import Callable

import nexrl_client
import pytest
from nexrl_client import (
    HTTPTrainServiceClient,
    MockTrainServiceClient,
    TrainServiceClient,
    advantages,
    create_train_service_client,
    layout,
    testing,
)
from nexrl_contract.operations import OPERATIONS

SIGNATURES = {
    "initialize_worker": "config_path=None, config_dict=None, role='actor', world_size=None, "
    "zmq_base_port=None, "
    "dispatch_mode=None",
    "init_model": "",
    "barrier": "",
    "destroy": "",
    "update_actor": "batch, explain=False",
    "update_actor_with_distillation": (
        "batch, distillation_coeff=None, distillation_loss=None, explain=False"
    ),
    "compute_log_prob": "batch, top_k=None, explain=False",
    "compute_ref_log_prob": "batch, explain=False",
    "compute_values": "batch, explain=False",
    "update_critic": "batch, explain=False",
    "compute_rewards": "batch, explain=False",
    "forward_backward": "batch, loss=None, explain=False",
    "optim_step": "lr=None, grad_clip=None, discard=False",
    "save_checkpoint": "local_path, hdfs_path=None, global_step=0, saved_fully_shared_ckpt=True, "
    "save_weight_only=False, remove_previous_ckpt=True",
    "load_checkpoint": "path, del_local_after_load=True, load_weight_only=False",
    "convert_checkpoint_to_huggingface": "local_path",
    "health_check": "",
    "get_models": "",
    "worker_info": "",
    "actor_context": "",
    "submit": "operation, batch=None, **params",
    "submit_async": "operation, batch=None, **params",
}


def signature(function: Callable[..., object]) -> str:
    """Parameters and defaults, without self and annotations."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return ", ".join(str(parameter.replace(annotation=parameter.empty)) for parameter in parameters)


def public_names(module: types.ModuleType) -> set[str]:
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType)
        and name != "annotations"
    }


def test_all_is_what_is_public() -> None:
    """__all__ is exactly what can be imported, each name once."""
    assert set(nexrl_client.__all__) == public_names(nexrl_client)
    assert len(set(nexrl_client.__all__)) == len(nexrl_client.__all__)
    assert set(nexrl_client.errors.__all__) < set(nexrl_client.__all__)
    for module in (testing, advantages, layout):
        assert set(module.__all__) <= public_names(module)
    assert set(advantages.__all__) - {"Estimator"} | set(layout.__all__) < set(nexrl_client.__all__)


@pytest.mark.parametrize(
    "kind", [TrainServiceClient, HTTPTrainServiceClient, MockTrainServiceClient]
)
@pytest.mark.parametrize("method", SIGNATURES)
def test_signatures_are_the_contract(kind: type, method: str) -> None:
    """Every client has the documented methods with the documented arguments and defaults."""
    assert signature(getattr(kind, method)) == SIGNATURES[method]


@pytest.mark.parametrize("method", [name for name, text in SIGNATURES.items() if "explain" in text])
def test_explain_is_keyword_only(method: str) -> None:
    """Every method of a batch has explain, and no positional argument can be taken for it."""
    assert (
        inspect.signature(getattr(TrainServiceClient, method)).parameters["explain"].kind
        is inspect.Parameter.KEYWORD_ONLY
    )
    assert {name for name, kind in OPERATIONS.items() if kind.takes_batch} == {
        name for name, text in SIGNATURES.items() if "explain" in text
    }


def test_interface_has_nothing_else() -> None:
    """An own implementation provides submit, and what asks the service about itself; the operations
    follow."""
    public = {
        name
        for name, value in vars(TrainServiceClient).items()
        if callable(value) and name[0] != "_"
    }
    assert public == SIGNATURES.keys()
    assert TrainServiceClient.__abstractmethods__ == {
        "submit",
        "health_check",
        "get_models",
        "worker_info",
    }


def test_constructors() -> None:
    """Clients are made from an address and an identifier, which then stays."""
    positional = [
        str(p)
        for p in inspect.signature(HTTPTrainServiceClient).parameters.values()
        if p.kind != p.KEYWORD_ONLY
    ]
    assert [text.split(":")[0] for text in positional] == ["base_url", "identifier"]
    assert HTTPTrainServiceClient().base_url == "http://localhost:8000"
    for client in (
        HTTPTrainServiceClient(identifier="student"),
        MockTrainServiceClient(identifier="student"),
    ):
        assert client.identifier == "student"
        assert client.request_timeout == 200
        with pytest.raises(AttributeError):
            client.identifier = "teacher"  # type: ignore[misc]
        with client.actor_context() as same:
            assert same is client


@pytest.mark.parametrize("backend", ["self-hosted", "http", "nextrainer"])
def test_factory_makes_http_clients(backend: str) -> None:
    """All names of the service over HTTP give its client, with its options."""
    client = create_train_service_client(
        backend, "host:9000/", "student", request_timeout=3, progress=True
    )
    assert isinstance(client, HTTPTrainServiceClient)
    assert (client.base_url, client.identifier, client.request_timeout) == (
        "http://host:9000",
        "student",
        3,
    )


def test_factory_makes_the_mock() -> None:
    """backend="mock" needs no server."""
    client = create_train_service_client(
        backend="mock", url="mock://localhost", identifier="student"
    )
    assert isinstance(client, MockTrainServiceClient)
    assert client.health_check()["status"] == "healthy"


def test_factory_refuses_what_it_does_not_know() -> None:
    """Unknown backends and options are ValueErrors that name the known ones."""
    with pytest.raises(ValueError, match="self-hosted, http, nextrainer, mock"):
        create_train_service_client("zmq", "localhost:8000")
    with pytest.raises(ValueError, match="did you mean request_timeout"):
        create_train_service_client("http", "localhost:8000", request_timeuot=3)
    with pytest.raises(ValueError, match="known are request_timeout"):
        create_train_service_client("mock", "mock://localhost", progress=True)


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("10.0.0.1", "http://10.0.0.1"),
        ("gateway:80/", "http://gateway:80"),
        ("https://gateway/nexrl/", "https://gateway/nexrl"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_addresses(given: str, url: str) -> None:
    """A scheme is added where there is none, also before host:port; a slash at the end goes."""
    assert HTTPTrainServiceClient(given).base_url == url


@pytest.mark.parametrize(
    "given",
    ["", "   ", "http://", "mock://localhost", "ftp://host", "http://host:no", "http://host:99999"],
)
def test_addresses_that_are_none(given: str) -> None:
    """What is no http address is refused when the client is made."""
    with pytest.raises(nexrl_client.InvalidURL):
        HTTPTrainServiceClient(given)


def test_import_is_light() -> None:
    """Importing the client, and computing on NumPy arrays, imports neither torch nor tqdm."""
    code = (
        "import sys, nexrl_client, nexrl_client.testing; nexrl_client.whiten([[1.0]], [[1]])\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'tqdm')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
