"""Everything wrong with a checkpoint is a CHECKPOINT_INVALID that says what, found before any
weight could change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nexrl_checkpointer.publish import publish
from nexrl_contract.errors import ServiceError
from nexrl_worker.checkpoint.load import inspect
from safetensors.torch import save_file

from tests.helpers.toy_checkpoints import make_request, make_state, stage


def published(tmp_path: Path) -> Path:
    path = tmp_path / "ckpt"
    publish(make_request(tmp_path, path), lambda: None)
    return path


def nothing_there(tmp_path: Path) -> Path:
    return tmp_path / "nowhere"


def a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("x")
    return tmp_path / "file"


def a_name_too_long(tmp_path: Path) -> Path:
    return tmp_path / ("n" * 300)


def never_published(tmp_path: Path) -> Path:
    return stage(tmp_path, "b" * 32, make_state())


def shard_missing(tmp_path: Path) -> Path:
    path = published(tmp_path)
    (path / "model.rank2-of-3.safetensors").unlink()
    return path


def shard_cut_short(tmp_path: Path) -> Path:
    path = published(tmp_path)
    file = path / "model.rank2-of-3.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return path


def manifest_is_text(tmp_path: Path) -> Path:
    path = published(tmp_path)
    (path / "manifest.json").write_text("hello")
    return path


def manifest_from_the_future(tmp_path: Path) -> Path:
    path = published(tmp_path)
    manifest = json.loads((path / "manifest.json").read_bytes())
    (path / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 2}))
    return path


def manifest_that_leaves_the_folder(tmp_path: Path) -> Path:
    path = published(tmp_path)
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest["files"][0]["name"] = "../../etc/passwd"
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def foreign_folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    return tmp_path / "photos"


def pickled_weights(tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    return folder


def indexed_file_missing(tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
    )
    return folder


CASES: dict[Callable[[Path], Path], str] = {
    nothing_there: "there is no checkpoint at",
    a_file: "there is no checkpoint at",
    a_name_too_long: "there is no checkpoint at .*: File name too long",
    never_published: "its save was never finished",
    shard_missing: r"model\.rank2-of-3\.safetensors is missing",
    shard_cut_short: r"model\.rank2-of-3\.safetensors has \d+ bytes; \d+ were written",
    manifest_is_text: "manifest.json: Invalid JSON",
    manifest_from_the_future: "manifest.json: schema_version",
    manifest_that_leaves_the_folder: "leaves the checkpoint's folder",
    foreign_folder: "neither a manifest nor a Hugging Face config.json",
    pickled_weights: "no safetensors weights",
    indexed_file_missing: "is missing, but the index names it",
}


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_what_is_wrong_is_said(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    """Missing, partial, damaged and foreign folders are refused by looking at them."""
    with pytest.raises(ServiceError, match=CASES[make]) as caught:
        inspect(make(tmp_path))
    assert caught.value.code == "CHECKPOINT_INVALID"


def test_a_truncated_file_of_another_maker_is_refused(tmp_path: Path) -> None:
    """Without hashes to go by, opening the tensors finds it, still before loading."""
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.ones(100)}, str(tmp_path / "model.safetensors"))
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-4])
    with pytest.raises(ServiceError, match=r"CHECKPOINT_INVALID: .*cannot be read"):
        inspect(tmp_path).reader()


@pytest.mark.parametrize(
    ("needed", "message"),
    [
        ({"other.weight": (4,)}, "has no tensor other.weight"),
        ({"embed.weight": (10, 4)}, r"\[10, 3\], the model's has \[10, 4\]"),
    ],
)
def test_another_models_checkpoint_is_refused(
    tmp_path: Path, needed: dict[str, tuple[int, ...]], message: str
) -> None:
    """Names and shapes are compared with the group's before anything is read."""
    plan = inspect(published(tmp_path))
    with pytest.raises(ServiceError, match=message):
        plan.check_fits(plan.reader(), needed, "Toy")


def test_a_link_is_followed_once(tmp_path: Path) -> None:
    """A plan keeps the folder it found, even if the link moves on."""
    path = published(tmp_path)
    link = tmp_path / "latest"
    link.symlink_to(path.name)
    plan = inspect(link)
    link.unlink()
    plan.verify(0, 1)
    assert plan.folder == path.resolve()
