"""Where a checkpoint may be written: what could never be published there is refused before a job is
made of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.gateway import ASYNC, Gateway, PlayedGroup, refusal

SHARDED: dict[str, Any] = {"saved_fully_shared_ckpt": True}
EXPORT: dict[str, Any] = {"saved_fully_shared_ckpt": False}
WRITES = {
    "sharded": ("/save_checkpoint", SHARDED),
    "weight-sync": ("/save_checkpoint", EXPORT),
    "convert": ("/convert_checkpoint_to_huggingface", {}),
}


def make_weight_sync(folder: Path) -> None:
    """As two exports to ``folder`` leave it."""
    for number in (1, 2):
        version = folder.with_name(f".{folder.name}.v{number}")
        version.mkdir(parents=True)
        (version / "nexrl.json").write_text("{}")
    folder.symlink_to(f".{folder.name}.v2")


@pytest.mark.parametrize("kind", WRITES)
def test_a_path_below_a_file_is_refused(kind: str, gateway: Gateway, group: PlayedGroup) -> None:
    """The file is named, however far above it is."""
    verb, params = WRITES[kind]
    (gateway.data / "afile").write_text("x")
    for path in ("afile/x", "afile/x/y"):
        error = refusal(
            gateway.post(verb, json={"local_path": path, **params}), 422, "PATH_REFUSED"
        )
        assert (
            error["key"] == "local_path"
            and f"{gateway.data / 'afile'} is no folder" in error["message"]
        )
    assert group.waiting() == 0


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("n" * 181, "a name in it has 181 bytes; 180 are possible"),
        ("n" * 300, "a name in it has 300 bytes; 180 are possible"),
        ("\u00e4" * 91, "a name in it has 182 bytes; 180 are possible"),
        (f"{'n' * 256}/x", "a name in it has 256 bytes; 255 are possible"),
        ("/".join(["\U0001f40d" * 45] * 22), f"bytes; {3700} are possible"),
    ],
    ids=["181", "300", "umlauts", "above", "whole-path"],
)
def test_a_path_that_is_too_long_is_refused(
    kind: str, path: str, said: str, gateway: Gateway, group: PlayedGroup
) -> None:
    """In bytes, with the limit."""
    verb, params = WRITES[kind]
    error = refusal(gateway.post(verb, json={"local_path": path, **params}), 422, "PATH_REFUSED")
    assert (
        error["key"] == "local_path"
        and error["message"].startswith("local_path ")
        and said in error["message"]
    )
    assert group.waiting() == 0


def test_a_load_takes_what_the_file_system_can_hold(gateway: Gateway, group: PlayedGroup) -> None:
    """A folder that others made may have a longer name than ours."""
    error = refusal(gateway.post("/load_checkpoint", json={"path": "n" * 256}), 422, "PATH_REFUSED")
    assert error["key"] == "path" and "255 are possible" in error["message"]
    assert (
        gateway.post("/load_checkpoint", json={"path": "n" * 255}, headers=ASYNC).status_code == 202
    )
    assert (
        gateway.post("/save_checkpoint", json={"local_path": "n" * 180}, headers=ASYNC).status_code
        == 202
    )


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize("path", ["model/step_1", "model/a/b", ".model.v1/step_1", ".model.v2"])
def test_a_path_below_a_weight_sync_folder_is_refused(
    kind: str,
    path: str,
    gateway: Gateway,
    group: PlayedGroup,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Its versions are removed in time, and what is in them would go or be in the way; the folder
    is named."""
    run = gateway.data / tmp_path_factory.mktemp("run").name
    make_weight_sync(run / "model")
    verb, params = WRITES[kind]
    error = refusal(
        gateway.post(verb, json={"local_path": f"{run.name}/{path}", **params}), 422, "PATH_REFUSED"
    )
    assert (
        error["key"] == "local_path"
        and f"{run / 'model'} is a weight-sync folder" in error["message"]
    )
    assert group.waiting() == 0 and sorted(os.listdir(run)) == [".model.v1", ".model.v2", "model"]


def test_the_weight_sync_folder_itself_and_what_lies_beside_it_are_taken(
    gateway: Gateway, group: PlayedGroup, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As are a load from inside, and a folder of others that happens to have such a name."""
    run = gateway.data / tmp_path_factory.mktemp("run").name
    make_weight_sync(run / "model")
    (run / ".other.v1").mkdir()
    for verb, params in (
        ("/save_checkpoint", {"local_path": f"{run.name}/model", **EXPORT}),
        ("/save_checkpoint", {"local_path": f"{run.name}/step_1"}),
        ("/save_checkpoint", {"local_path": f"{run.name}/.other.v1/step_1"}),
        ("/load_checkpoint", {"path": f"{run.name}/model/step_1"}),
    ):
        assert gateway.post(verb, json=params, headers=ASYNC).status_code == 202, params
    assert group.waiting() == 4


NOT_MEANT = {
    "~": "~/runs/step_1",
    "another home": "~root/step_1",
    "a variable": "$HOME/step_1",
    "a newline": "step_1\n",
    "a newline within": "runs\nx/step_1",
    "a zero": "step\0_1",
    "a tab": "step\t1",
    "an escape": "\x1b[31mred",
    "a line separator": "step\u2028_1",
}


@pytest.mark.parametrize("name", NOT_MEANT)
def test_a_path_that_cannot_have_been_meant_is_refused_in_one_line(
    name: str, gateway: Gateway, group: PlayedGroup
) -> None:
    """In whatever a path is given for; the line itself holds no such character."""
    path = NOT_MEANT[name]
    model = {"config_dict": {"actor": {"model": {"path": path}}}, "world_size": 1}
    bodies: list[tuple[str, dict[str, Any], str]] = [
        *((verb, {"local_path": path, **params}, "local_path") for verb, params in WRITES.values()),
        ("/load_checkpoint", {"path": path}, "path"),
        ("/initialize?identifier=new", model, "actor.model.path"),
    ]
    for verb, body, key in bodies:
        error = refusal(gateway.post(verb, json=body), 422, "PATH_REFUSED")
        assert error["key"] == key
        assert error["message"].isprintable() and error["message"].isascii()
    assert group.waiting() == 0


def initialize(gateway: Gateway, path: object, code: str) -> str:
    body = {"config_dict": {"actor": {"model": {"path": str(path)}}}, "world_size": 1}
    error = refusal(gateway.post("/initialize?identifier=new", json=body), 422, code)
    assert error["key"] == "actor.model.path" and "\n" not in error["message"]
    return str(error["message"])


@pytest.mark.parametrize("path", ["Qwen/Qwen2.5-0.5B", "gpt2", "./tiny", "models/tiny", "../tiny"])
def test_a_relative_model_path_is_refused_where_it_would_mean_wherever_the_service_was_started(
    path: str, gateway: Gateway, group: PlayedGroup
) -> None:
    """What may be a model of the hub is told how to become a folder; what a checkpoint root has is
    named."""
    message = initialize(gateway, path, "PATH_REFUSED")
    assert "not absolute" in message
    assert (f"hf download {path} --local-dir DIR" in message) == (not path.startswith("."))
    folder = gateway.data / path
    if not path.startswith(".."):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        assert f"such as {folder}" in initialize(gateway, path, "PATH_REFUSED")


def test_what_is_there_instead_of_a_models_folder_is_said(
    gateway: Gateway, group: PlayedGroup, tmp_path: Path
) -> None:
    """A file of the folder, and the hub's cache, whose folders lie deeper."""
    (tmp_path / "config.json").write_text("{}")
    assert "that is a file: give its folder" in initialize(
        gateway, tmp_path / "config.json", "INVALID_CONFIG"
    )
    cache = tmp_path / "models--Qwen--Qwen2.5-0.5B"
    snapshot = cache / "snapshots" / "060db6"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert f"give {snapshot}" in initialize(gateway, cache, "INVALID_CONFIG")
    assert initialize(gateway, tmp_path / "none", "INVALID_CONFIG").endswith(
        f"config.json at {tmp_path / 'none'}"
    )


def test_a_path_outside_the_roots_names_the_option_that_adds_one(
    gateway: Gateway, group: PlayedGroup, tmp_path: Path
) -> None:
    """And a model's folder that was given as a checkpoint is told where it belongs."""
    (tmp_path / "config.json").write_text("{}")
    for verb, key in (
        ("/load_checkpoint", "path"),
        ("/save_checkpoint", "local_path"),
        ("/convert_checkpoint_to_huggingface", "local_path"),
    ):
        said = refusal(gateway.post(verb, json={key: str(tmp_path / "ckpt")}), 422, "PATH_REFUSED")[
            "message"
        ]
        assert "--checkpoint-root" in said and "NEXRL_DATA" in said and "model.path" not in said
        said = refusal(gateway.post(verb, json={key: str(tmp_path)}), 422, "PATH_REFUSED")[
            "message"
        ]
        assert "--checkpoint-root" in said and "actor.model.path" in said
