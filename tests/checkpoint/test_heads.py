"""A checkpoint of a model with another head is refused, whole and in time: a tied head needs
nothing that it lacks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from nexrl_storage.manifest import describe, read_manifest, write_manifest
from nexrl_worker.rank.request import Refused
from safetensors.torch import load_file, save_file

from tests.helpers.engines import save_model
from tests.helpers.one_group import Group

MODELS = {"actor": "Qwen2ForCausalLM", "critic": "Qwen2ForTokenClassification"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("heads")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=0, world_size=1
    )
    save_model(folder / "model")  # its head is tied
    yield folder
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def saved(folder: Path) -> dict[str, Path]:
    """What an actor and a critic of the same folder save after a step, in every form."""
    paths = {}
    for role in MODELS:
        group = Group(folder, role, str(folder / "model"))
        group.learn()
        paths[f"{role} sharded"] = group.save(folder / f"{role}-sharded", sharded=True)
        paths[f"{role} weights"] = group.save(
            folder / f"{role}-weights", sharded=True, weight_only=True
        )
        paths[f"{role} huggingface"] = group.save(folder / f"{role}-export", sharded=False)
        paths[f"{role} older"] = older(group.save(folder / f"{role}-older", sharded=True))
    return paths


def older(path: Path) -> Path:
    """A checkpoint from before the model's class was written."""
    state = json.loads((path / "state.json").read_bytes())
    assert state.pop("architecture").startswith("Qwen2For")
    (path / "state.json").write_text(json.dumps(state))
    manifest = read_manifest(path)
    assert manifest is not None
    files = [
        describe(path, file.name) if file.name == "state.json" else file for file in manifest.files
    ]
    write_manifest(path, manifest.model_copy(update={"files": tuple(files)}))
    return path


@pytest.mark.parametrize("form", ["sharded", "weights", "huggingface", "older"])
@pytest.mark.parametrize(("held", "given"), [("actor", "critic"), ("critic", "actor")])
@pytest.mark.parametrize("weight_only", [False, True])
def test_another_head_is_refused(
    folder: Path, saved: dict[str, Path], held: str, given: str, form: str, weight_only: bool
) -> None:
    """The message names what is wrong; weights, moments and schedule stay."""
    group = Group(folder, held, str(folder / "model"))
    group.learn()
    before = group.state()

    with pytest.raises(Refused) as caught:
        group.load(saved[f"{given} {form}"], weight_only=weight_only)

    assert caught.value.code == "CHECKPOINT_INVALID"
    if form in ("sharded", "weights"):
        assert all(MODELS[role] in caught.value.message for role in (held, given))
    else:
        assert "score." in caught.value.message
    assert group.state() == before


@pytest.mark.parametrize("form", ["sharded", "weights", "huggingface", "older"])
@pytest.mark.parametrize(
    ("held", "given"),
    [("actor", "actor"), ("critic", "critic"), ("ref", "actor"), ("teacher", "actor")],
)
def test_the_same_head_loads(
    folder: Path, saved: dict[str, Path], held: str, given: str, form: str
) -> None:
    """Into a group of the same class, whatever its role, the weights come back; moments where there
    is an optimizer."""
    group = Group(folder, held, str(folder / "model"))
    before = group.engine.state.fingerprint()

    found = group.load(saved[f"{given} {form}"])

    restored = form in ("sharded", "older") and held == given
    assert found["optimizer"] == ("restored" if restored else "kept")
    assert group.engine.state.fingerprint() != before
    assert group.engine.state.optimizer_steps == (1 if restored else 0)


@pytest.mark.parametrize("role", ["ref", "teacher"])
def test_what_a_group_without_an_optimizer_saves_is_weights(folder: Path, role: str) -> None:
    """An actor loads a full save of it: the weights come back, its own moments and schedule
    stay."""
    frozen = Group(folder, role, str(folder / "model"))
    path = frozen.save(folder / f"{role}-full", sharded=True)
    actor = Group(folder, "actor", str(folder / "model"))
    actor.learn()
    before = actor.moments()

    found = actor.load(path)

    assert found["optimizer"] == "kept" and not list(path.glob("optim*"))
    assert actor.engine.state.fingerprint() == frozen.engine.state.fingerprint()
    assert actor.moments() == before and actor.engine.state.optimizer_steps == 1


def test_a_head_written_twice_loads(folder: Path) -> None:
    """Others write a tied head a second time, and buffers that nobody needs: that is no other
    model."""
    path = folder / "twice"
    save_model(path)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    save_file(weights, path / "model.safetensors", {"format": "pt"})

    assert Group(folder, "actor", str(folder / "model")).load(path)["kind"] == "huggingface"
