"""Where a checkpoint may be written: what could never be published there is refused before a job is made of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from gateway.kit import ASYNC, Gateway, PlayedGroup, refusal

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
        error = refusal(gateway.post(verb, json={"local_path": path, **params}), 422, "PATH_REFUSED")
        assert error["key"] == "local_path" and f"{gateway.data / 'afile'} is no folder" in error["message"]
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
    assert error["key"] == "local_path" and error["message"].startswith("local_path ") and said in error["message"]
    assert group.waiting() == 0


def test_a_load_takes_what_the_file_system_can_hold(gateway: Gateway, group: PlayedGroup) -> None:
    """A folder that others made may have a longer name than ours."""
    error = refusal(gateway.post("/load_checkpoint", json={"path": "n" * 256}), 422, "PATH_REFUSED")
    assert error["key"] == "path" and "255 are possible" in error["message"]
    assert gateway.post("/load_checkpoint", json={"path": "n" * 255}, headers=ASYNC).status_code == 202
    assert gateway.post("/save_checkpoint", json={"local_path": "n" * 180}, headers=ASYNC).status_code == 202


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize("path", ["model/step_1", "model/a/b", ".model.v1/step_1", ".model.v2"])
def test_a_path_below_a_weight_sync_folder_is_refused(
    kind: str, path: str, gateway: Gateway, group: PlayedGroup, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Its versions are removed in time, and what is in them would go or be in the way; the folder is named."""
    run = gateway.data / tmp_path_factory.mktemp("run").name
    make_weight_sync(run / "model")
    verb, params = WRITES[kind]
    error = refusal(gateway.post(verb, json={"local_path": f"{run.name}/{path}", **params}), 422, "PATH_REFUSED")
    assert error["key"] == "local_path" and f"{run / 'model'} is a weight-sync folder" in error["message"]
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
