"""Sharded saves: any world size reads what any other wrote, bit for bit, and damage has a name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from nexrl_checkpointer.publish import publish
from nexrl_contract.errors import ServiceError
from nexrl_storage.manifest import read_manifest
from nexrl_worker.checkpoint.load import inspect
from nexrl_worker.checkpoint.manager import empty_folder
from nexrl_worker.checkpoint.shards import ShardReader, write_shards
from safetensors import safe_open

from tests.helpers.toy_checkpoints import cut, equal, make_request, make_state, read_all, stage


def saved(data: Path, **changes: bool) -> Path:
    path = data / "ckpt" / "step_1"
    publish(make_request(data, path, make_state(), **changes), lambda: None)
    return path


@pytest.mark.parametrize("readers", [1, 2, 4, 12])
def test_any_world_size_reads_what_three_ranks_wrote(tmp_path: Path, readers: int) -> None:
    """Row ranges of weights and moments come back with the same bits and dtypes, across the
    writers' cuts."""
    plan = inspect(saved(tmp_path))
    reader = plan.reader()
    assert plan.kind == "sharded" and plan.has_optimizer and plan.step == 1
    assert equal(read_all(reader, make_state(), readers), make_state())


def test_a_tensor_without_dimensions_survives(tmp_path: Path) -> None:
    """0-dim tensors are saved once and read whole."""
    state = {**make_state(), "scale": torch.tensor(3.5)}
    path = tmp_path / "ckpt"
    publish(make_request(tmp_path, path, state), lambda: None)
    assert inspect(path).reader().read("scale", 0, 1).item() == 3.5


def test_state_and_random_generators_come_back(tmp_path: Path) -> None:
    """The same world size gets each rank's generators; another one gets none and has to reseed from
    the saved seed."""
    plan = inspect(saved(tmp_path))
    assert plan.state() == {"scalars": {"optimizer_steps": 4}, "seed": 7}
    assert [plan.rng(rank, 3) for rank in range(3)] == [
        {"torch": f"state of {rank}"} for rank in range(3)
    ]
    assert plan.rng(0, 2) is None


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    """Every file parses as JSON or safetensors by its name; the model's own code does not
    travel."""
    path = saved(tmp_path)
    files = [file for file in path.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".json", ".safetensors"}
    for file in files:
        if file.suffix == ".json":
            json.loads(file.read_bytes())
        else:
            with safe_open(str(file), framework="pt") as tensors:
                assert tensors.metadata() == {"format": "pt"}
    assert (path / "huggingface" / "tokenizer.json").is_file()


def test_a_weight_only_save_has_no_optimizer_and_loads(tmp_path: Path) -> None:
    """It says so, its weights are whole, and it fits a group that needs moments otherwise."""
    plan = inspect(saved(tmp_path, weight_only=True))
    reader = plan.reader()
    assert not plan.has_optimizer
    assert not any(name.startswith("optim.") for name in reader.shapes)
    plan.check_fits(
        reader, {name: tuple(tensor.shape) for name, tensor in make_state().items()}, "Toy"
    )


def test_a_flipped_byte_is_found_by_the_rank_that_hashes_the_file(tmp_path: Path) -> None:
    """Ranks share the hashing, and the one whose share is damaged names the file."""
    path = saved(tmp_path)
    manifest = read_manifest(path)
    assert manifest is not None
    names = [entry.name for entry in manifest.files]
    victim = names.index("optim.rank1-of-3.safetensors")
    content = bytearray((path / names[victim]).read_bytes())
    content[-1] ^= 1
    (path / names[victim]).write_bytes(content)
    plan = inspect(path)
    for rank in range(4):
        if rank == victim % 4:
            with pytest.raises(
                ServiceError,
                match=r"CHECKPOINT_INVALID: .*optim\.rank1-of-3\.safetensors is corrupt",
            ):
                plan.verify(rank, 4)
        else:
            plan.verify(rank, 4)


def test_rows_that_nobody_wrote_are_noticed_before_reading(tmp_path: Path) -> None:
    """An index that leaves rows out makes the whole checkpoint invalid, naming the tensor."""
    path = saved(tmp_path)
    index = json.loads((path / "rank1-of-3.json").read_bytes())
    del index["tensors"]["embed.weight"]
    (path / "rank1-of-3.json").write_text(json.dumps(index))
    manifest = read_manifest(path)
    assert manifest is not None
    with pytest.raises(ServiceError, match=r"embed\.weight has rows up to 4 of 10"):
        ShardReader(path, manifest)


def test_a_full_disk_is_no_space_and_leaves_nothing(tmp_path: Path) -> None:
    """The kernel's own "no space left" becomes NO_SPACE, and the rank's files are gone."""
    (tmp_path / ".optim.rank0-of-1.safetensors.tmp").symlink_to("/dev/full")
    with pytest.raises(ServiceError, match="NO_SPACE"):
        write_shards(tmp_path, 0, 1, cut(make_state(), 0, 1), {}, None)
    assert list(tmp_path.iterdir()) == []


def test_staging_starts_empty(tmp_path: Path) -> None:
    """A second attempt at the same save finds nothing of the first."""
    folder = stage(tmp_path, "a" * 32, make_state())
    empty_folder(folder)
    assert list(folder.iterdir()) == []
