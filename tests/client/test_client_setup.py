"""initialize_worker: where the configuration comes from, and what names the group."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nexrl_client import ClientError, HTTPTrainServiceClient, InvalidSetup, testing
from omegaconf import OmegaConf

SERVICE = """
service:
  train_service:
    main_actor: {identifier: student, role: actor, actor: {model: {path: /m}, optim: {lr: 2e-6}}}
    teacher: {role: teacher, actor: {model: {path: /t}}}
"""
ENTRY = "identifier: student\nactor: {model: {path: /m}}\n"


def initialize(identifier: str | None = None, **arguments: Any) -> testing.Recorded:
    """The request of one initialize_worker."""
    transport = testing.ScriptedTransport([testing.json_response({"status": "success"})])
    HTTPTrainServiceClient(identifier=identifier, transport=transport).initialize_worker(
        **arguments
    )
    return transport.requests[0]


def test_body_has_the_arguments() -> None:
    """Everything that was given is sent under its own name; what was not is left to the service."""
    config = {"actor": {"model": {"path": "/m"}}}
    request = initialize(
        "student",
        config_dict=config,
        role="teacher",
        world_size=2,
        zmq_base_port=5555,
        dispatch_mode="x",
    )
    assert (request.method, request.path, request.query) == (
        "POST",
        "/initialize",
        {"identifier": "student"},
    )
    assert request.json() == {
        "config_dict": config,
        "role": "teacher",
        "identifier": "student",
        "world_size": 2,
        "zmq_base_port": 5555,
        "dispatch_mode": "x",
    }
    bare = initialize("student", config_dict=config)
    assert bare.json() == {"config_dict": config, "identifier": "student"}


def test_the_entry_says_the_role(tmp_path: Path) -> None:
    """In a file or a dict: the default argument leaves it to the service to read it there; another
    one is sent."""
    file = tmp_path / "config.yaml"
    file.write_text(SERVICE)
    for arguments in (
        {"config_path": str(file)},
        {"config_dict": {"role": "teacher", "actor": {}}},
    ):
        body = initialize("teacher", **arguments).json()
        assert body["config_dict"]["role"] == "teacher"
        assert "role" not in body
        assert initialize("teacher", role="ref", **arguments).json()["role"] == "ref"


@pytest.mark.parametrize(
    ("text", "identifier", "path"),
    [
        (SERVICE, "student", "/m"),
        (SERVICE, "teacher", "/t"),
        (ENTRY, None, "/m"),
        (
            "service: {train_service: {only: {identifier: x, actor: {model: {path: /o}}}}}",
            "other",
            "/o",
        ),
        (
            "service: {train_service: {identifier: x, backend: http, actor: {model: {path: /f}}}}",
            None,
            "/f",
        ),
    ],
)
def test_config_path(tmp_path: Path, text: str, identifier: str | None, path: str) -> None:
    """The file is read here: one entry of a service's YAML by identifier or name or as the only
    one, or the entry itself."""
    file = tmp_path / "config.yaml"
    file.write_text(text)
    body = initialize(identifier, config_path=str(file)).json()
    assert body["config_dict"]["actor"]["model"]["path"] == path
    assert "config_path" not in body


def test_yaml_numbers(tmp_path: Path) -> None:
    """2e-6 is a number, as YAML 1.2 has it."""
    file = tmp_path / "config.yaml"
    file.write_text(SERVICE)
    assert (
        initialize("student", config_path=str(file)).json()["config_dict"]["actor"]["optim"]["lr"]
        == 2e-6
    )


def test_who_names_the_group(tmp_path: Path) -> None:
    """The client's identifier wins over the configuration's; without both there is nothing to
    make."""
    assert initialize("mine", config_dict={"identifier": "theirs"}).json()["identifier"] == "mine"
    request = initialize(None, config_dict={"identifier": "theirs"})
    assert (request.json()["identifier"], request.query) == ("theirs", {})
    with pytest.raises(InvalidSetup, match="identifier"):
        initialize(None, config_dict={"actor": {}})


def test_config_dict_wins(tmp_path: Path) -> None:
    """With both given the file is not even opened."""
    body = initialize(
        "student", config_path=str(tmp_path / "absent.yaml"), config_dict={"actor": {"x": 1}}
    ).json()
    assert body["config_dict"] == {"actor": {"x": 1}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SERVICE, "main_actor, teacher"),
        ("a: [1", "cannot be read"),
        ("- 1", "must hold a mapping"),
        ("trainer: {}", "neither service.train_service nor actor"),
    ],
)
def test_unusable_files(tmp_path: Path, text: str, message: str) -> None:
    """A file that is no, or no unambiguous, configuration is refused with its name."""
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(InvalidSetup, match=message) as caught:
        initialize(None, config_path=str(file))
    assert str(file) in str(caught.value)


def test_nothing_given(tmp_path: Path) -> None:
    """Neither path nor dict, and a path to nothing, are ValueErrors."""
    with pytest.raises(ValueError, match="config_dict, or config_path"):
        initialize("student")
    with pytest.raises(ValueError, match=r"absent\.yaml"):
        initialize("student", config_path=str(tmp_path / "absent.yaml"))
    for value, kind in (
        (Decimal("1e-6"), "Decimal"),
        ({1}, "set"),
        (b"x", "bytes"),
        (np.zeros(2), "ndarray"),
    ):
        with pytest.raises(ValueError, match=rf"argument config_dict\.actor\.optim\.lr is {kind}"):
            initialize("student", config_dict={"actor": {"optim": {"lr": value}}})


def test_configurations_of_other_libraries() -> None:
    """Paths are text, scalars of any library numbers, and OmegaConf's containers what they resolve
    to."""
    held = OmegaConf.create(
        {
            "lr": 1e-3,
            "actor": {
                "model": {"path": Path("/m")},
                "optim": {"lr": "${lr}", "betas": [0.9, 0.99]},
            },
        }
    )
    plain = {"model": {"path": "/m"}, "optim": {"lr": 1e-3, "betas": [0.9, 0.99]}}
    assert initialize("student", config_dict=held).json()["config_dict"]["actor"] == plain
    scalars = {
        "model": {"path": Path("/m")},
        "optim": {"lr": np.float64(1e-3), "betas": (np.float64(0.9), 0.99)},
    }
    assert (
        initialize("student", config_dict={"actor": scalars}).json()["config_dict"]["actor"]
        == plain
    )
    unresolved = OmegaConf.create({"actor": {"optim": {"lr": "${absent}"}}})
    with pytest.raises(ValueError, match=r"config_dict\.actor\.optim cannot be read: .*absent"):
        initialize("student", config_dict=unresolved)
    for text in ({"identifier": "???", "actor": {}}, {"actor": "${absent}"}):
        with pytest.raises(ClientError, match=r"config_dict cannot be read"):
            initialize(config_dict=OmegaConf.create(text))
