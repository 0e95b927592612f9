"""A whole service's configuration: its entries, and a client for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from nexrl_client import (
    HTTPTrainServiceClient,
    InvalidSetup,
    MockTrainServiceClient,
    UnknownBackend,
    create_train_service_client,
    create_train_service_clients,
    load_service_config,
)

from tests.helpers.scripted_server import ScriptedServer

SERVICE = """
service:
  train_service:
    main_actor:
      identifier: student
      role: actor
      backend: http
      url: "URL"
      resource: {world_size: 2}
      actor: {model: {path: /m}, optim: {lr: 2e-6}}
    judge: {role: teacher, backend: mock, url: "mock://localhost", actor: {model: {path: /t}}}
weight: {sync_weight_path: "${trainer.sync_weight_path}"}
"""
ENTRY = "{identifier: student, role: teacher, actor: {model: {path: /m}, optim: {lr: 2e-6}}}"


def load(tmp_path: Path, text: str) -> dict[str, dict[str, Any]]:
    file = tmp_path / "service.yaml"
    file.write_text(text)
    return load_service_config(file)


def test_several_services(tmp_path: Path) -> None:
    """Every entry under service.train_service is there by name, with YAML 1.2's numbers; the rest
    of the file is not."""
    config = load(tmp_path, SERVICE)
    assert list(config) == ["main_actor", "judge"]
    assert config["main_actor"]["actor"]["optim"]["lr"] == 2e-6
    assert config["judge"]["role"] == "teacher"


def test_a_file_of_ones_own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is the client's, so its ~ is, too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "service.yaml").write_text(ENTRY)
    assert list(load_service_config("~/service.yaml")) == ["student"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (ENTRY, "student"),
        ("actor: {model: {path: /m}}", "default"),
        (
            "service: {train_service: {identifier: x, backend: http, actor: {model: {path: /m}}}}",
            "x",
        ),
        ("service: {train_service: {actor: {actor: {model: {path: /m}}}}}", "actor"),
        (
            (
                "{actor: {actor: {model: {path: /m}}}, critic: {role: critic, actor: {model: "
                "{path: "
                "/m}}}}"
            ),
            "actor",
        ),
    ],
)
def test_one_entry(tmp_path: Path, text: str, name: str) -> None:
    """A file may be one entry, and a service may be called actor."""
    config = load(tmp_path, text)
    assert next(iter(config)) == name
    assert config[name]["actor"]["model"]["path"] == "/m"


def test_a_yaml_key_stands_once(tmp_path: Path) -> None:
    """The first of two sections would be lost without a word; what a merge brings may be said
    again."""
    with pytest.raises(InvalidSetup, match=r'duplicate key "optim"(?s:.)*line 4, column 3'):
        load(tmp_path, "actor:\n  optim: {lr: 1}\n  grad_clip: 1\n  optim: {eps: 2}\n")
    merged = load(
        tmp_path, "a: {actor: &a {<<: {x: 1, y: 2}, x: 3}}\nb:\n  actor: {<<: *a, y: 5}\n"
    )
    assert merged == {"a": {"actor": {"x": 3, "y": 2}}, "b": {"actor": {"x": 3, "y": 5}}}


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-6", 2e-6), ("1E3", 1000.0), (".5", 0.5), ("10", 10), ("-1.5e+2", -150.0), ("1e", "1e")],
)
def test_numbers_are_those_of_yaml_1_2(tmp_path: Path, text: str, value: object) -> None:
    loaded = load(tmp_path, f"actor: {{x: {text}}}")["default"]["actor"]["x"]
    assert loaded == value
    assert type(loaded) is type(value)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (SERVICE.replace("/t", "'${model.path}'"), "service.train_service.judge.actor.model.path"),
        (SERVICE.replace("student", "${id}"), "service.train_service.main_actor.identifier"),
        ("actor: {model: {path: /m}, optim: {betas: [0.9, 'x${beta}']}}", "actor.optim.betas[1]"),
        ("a: {actor: &a {model: {path: '${p}'}, self: *a}}", "a.actor.model.path"),
    ],
)
def test_interpolation_is_refused(tmp_path: Path, text: str, path: str) -> None:
    """A ${...} in an entry is refused by name, from the top of the file, by everything that reads
    entries."""
    with pytest.raises(InvalidSetup, match="interpolation is not resolved") as caught:
        load(tmp_path, text)
    assert caught.value.details["key"] == path
    assert f" {path} is " in str(caught.value)
    with pytest.raises(InvalidSetup, match="interpolation"):
        MockTrainServiceClient(identifier="student").initialize_worker(
            config_path=str(tmp_path / "service.yaml")
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "cannot be read"),
        ("- 1", "holds list; it must hold a mapping"),
        ("trainer: {}", "neither service.train_service nor actor"),
        ("service: {train_service: {}}", "nothing under service.train_service"),
        ("service: {train_service: {one: 3}}", "service.train_service.one is int"),
    ],
)
def test_unusable_files(tmp_path: Path, text: str, message: str) -> None:
    """A file without entries is refused with its name and what is wrong."""
    with pytest.raises(InvalidSetup, match=message) as caught:
        load(tmp_path, text)
    assert "service.yaml" in str(caught.value)


def test_clients_by_name_and_role(tmp_path: Path) -> None:
    """Each entry has a client of its backend, address and identifier, found by name and by role."""
    config = load(tmp_path, SERVICE.replace("URL", "http://host:9000"))
    with create_train_service_clients(config, request_timeout=3) as clients:
        student, judge = clients["main_actor"], clients["judge"]
        assert isinstance(student, HTTPTrainServiceClient) and isinstance(
            judge, MockTrainServiceClient
        )
        assert (student.base_url, student.identifier, student.request_timeout) == (
            "http://host:9000",
            "student",
            3,
        )
        assert judge.identifier == "judge"
        assert (clients.by_role("actor"), clients.by_role("teacher")) == (student, judge)
        assert dict(clients) == {"main_actor": student, "judge": judge}
        assert clients.roles == {"main_actor": "actor", "judge": "teacher"}
        with pytest.raises(
            InvalidSetup, match=r"'critic'; there are main_actor \(actor\), judge \(teacher\)"
        ):
            clients.by_role("critic")
    with pytest.raises(ValueError, match="closed"):
        student.barrier()


def test_a_whole_configuration_and_one_entry() -> None:
    """The configuration may be the whole one that a trainer has, or one entry; address and backend
    have defaults."""
    entry = {"identifier": "student", "actor": {"model": {"path": "/m"}}}
    for config in (
        {"service": {"train_service": {"student": entry}}, "trainer": {"x": "${y}"}},
        entry,
    ):
        client = create_train_service_clients(config)["student"]
        assert isinstance(client, HTTPTrainServiceClient)
        assert (client.base_url, client.identifier) == ("http://localhost:8000", "student")


def test_several_of_one_role() -> None:
    """by_role names the services that share a role."""
    entry = {"backend": "mock", "role": "teacher", "actor": {"model": {"path": "/m"}}}
    clients = create_train_service_clients({"math": entry, "code": entry})
    with pytest.raises(InvalidSetup, match="math, code all have the role 'teacher'"):
        clients.by_role("teacher")
    assert {client.identifier for client in clients.values()} == {"math", "code"}


def test_initialize_worker_without_arguments(server: ScriptedServer, tmp_path: Path) -> None:
    """A client of an entry starts its group with the entry's configuration and role; arguments
    still win."""
    config = load(
        tmp_path, SERVICE.replace("URL", server.url).replace("role: actor", "role: critic")
    )
    with create_train_service_clients(config) as clients:
        student = clients["main_actor"]
        student.initialize_worker()
        student.initialize_worker(role="ref", world_size=4)
        student.initialize_worker(config_dict={"actor": {"x": 1}})
    first, second, third = (request.json() for request in server.seen)
    assert first == {"config_dict": config["main_actor"], "identifier": "student"}
    assert first["config_dict"]["role"] == "critic"
    assert first["config_dict"]["resource"] == {"world_size": 2}
    assert second == first | {"role": "ref", "world_size": 4}
    assert third == {"config_dict": {"actor": {"x": 1}}, "identifier": "student"}


def test_the_mock_knows_its_entry() -> None:
    """Without a service too: the role is the entry's."""
    entry = {"role": "critic", "resource": {"world_size": 2}, "actor": {"model": {"path": "/m"}}}
    client = create_train_service_client("mock", "mock://localhost", "value", config=entry)
    started = client.initialize_worker()
    assert (started["identifier"], started["role"], started["world_size"]) == ("value", "critic", 2)
    assert client.worker_info()["role"] == "critic"


ACTOR = {"actor": {"model": {"path": "/m"}}}


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        (
            {"a": ACTOR | {"role": "techer"}},
            InvalidSetup,
            "a.role is 'techer'; known are actor, ref, teacher",
        ),
        ({"a": ACTOR | {"backend": "zmq"}}, UnknownBackend, "a: there is no backend 'zmq'"),
        (
            {"a": ACTOR | {"identifier": "x"}, "b": ACTOR | {"identifier": "x"}},
            InvalidSetup,
            "a and b are one group, 'x'",
        ),
        ({"trainer": {}}, InvalidSetup, "the configuration has neither"),
        ("service.yaml", InvalidSetup, "load_service_config"),
    ],
)
def test_unusable_configurations(config: Any, kind: type[Exception], message: str) -> None:
    """What gives no clear set of clients is refused with the entry's name."""
    with pytest.raises(kind, match=message):
        create_train_service_clients(config)
