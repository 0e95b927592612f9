"""Hugging Face folders: transformers loads them as they are, tied or not, sharded or not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from nexrl_contract.errors import ServiceError
from nexrl_storage.manifest import fingerprint_text, read_export, verify_files
from nexrl_worker.checkpoint.huggingface import FolderWriter, Stamp, export
from nexrl_worker.checkpoint.load import inspect
from nexrl_worker.training.model.fingerprint import fingerprint_of
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def model_folder(folder: Path, *, tied: bool) -> Path:
    """A source folder in bfloat16, whose config says so."""
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS, tie_word_embeddings=tied)).to(
        torch.bfloat16
    )
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def trained(source: Path) -> dict[str, Tensor]:
    """Float32 master weights that bfloat16 could not hold, named as the engine names them (a tied
    head once)."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return {name: param.detach() + 1e-6 for name, param in model.named_parameters()}


def written(
    tmp_path: Path, source: Path, shard_bytes: int = 10**9
) -> tuple[Path, dict[str, Tensor]]:
    weights = trained(source)
    folder = tmp_path / "out"
    folder.mkdir()
    writer = FolderWriter(
        folder,
        source,
        Stamp("student", 3, 12, fingerprint_text(fingerprint_of(weights.items()))),
        shard_bytes,
    )
    assert export(iter(weights.items()), writer) is None
    writer.finish()
    return folder, weights


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_transformers_loads_what_was_written(tmp_path: Path, tied: bool, shard_bytes: int) -> None:
    """All bits of the master weights come back without being asked for a dtype, and a tied head
    shares its memory."""
    folder, weights = written(tmp_path, model_folder(tmp_path / "source", tied=tied), shard_bytes)
    model = AutoModelForCausalLM.from_pretrained(folder)
    loaded = dict(model.named_parameters())
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert (folder / "model.safetensors.index.json").exists() is (shard_bytes == 20_000)


def test_every_file_says_which_weights_it_holds(tmp_path: Path) -> None:
    """Version and fingerprint stand in each safetensors file, and the fingerprint can be recomputed
    from the folder."""
    folder, weights = written(tmp_path, model_folder(tmp_path / "source", tied=True), 20_000)
    expected = fingerprint_text(fingerprint_of(weights.items()))
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        with safe_open(str(shard), framework="pt") as file:
            assert file.metadata() == {
                "format": "pt",
                "weight_version": "12",
                "fingerprint": expected,
            }
    record = read_export(folder)
    assert record is not None and (record.weight_version, record.step, record.ours) == (12, 3, True)
    verify_files(folder, record.files)
    assert {entry.name for entry in record.files} | {"nexrl.json"} == {
        path.name for path in folder.iterdir()
    }
    reader = inspect(folder).reader()
    whole = ((name, reader.read(name, 0, shape[0])) for name, shape in reader.shapes.items())
    assert fingerprint_text(fingerprint_of(whole)) == expected


def test_a_failing_writer_does_not_leave_the_gather(tmp_path: Path) -> None:
    """Rank 0 takes part in every gather that is left and reports its error afterwards."""
    source = model_folder(tmp_path / "source", tied=True)
    weights, taken = trained(source), []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for item in weights.items():
            taken.append(item[0])
            yield item

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".part-00001.tmp").symlink_to("/dev/full")
    writer = FolderWriter(
        tmp_path / "out", source, Stamp("student", 0, 0, "0" * 16), shard_bytes=20_000
    )
    error = export(stream(), writer)
    assert isinstance(error, ServiceError) and error.code == "NO_SPACE"
    assert taken == list(weights)


def test_ranks_without_a_writer_drain_the_stream() -> None:
    """Every rank but 0 gets None for each tensor and has nothing to report."""
    stream = iter([("a", None), ("b", None)])
    assert export(stream, None) is None
    assert next(stream, "drained") == "drained"


def test_a_folder_of_any_maker_gives_row_ranges(tmp_path: Path) -> None:
    """A model folder that transformers saved, in several files, is read by rows like a checkpoint
    of ours."""
    source = model_folder(tmp_path / "source", tied=False)
    model = AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path / "several", max_shard_size="20KB")
    plan = inspect(tmp_path / "several")
    reader = plan.reader()
    assert plan.kind == "huggingface" and plan.record is None and not plan.has_optimizer
    plan.check_fits(
        reader,
        {name: tuple(param.shape) for name, param in model.named_parameters()},
        "LlamaForCausalLM",
    )
    assert torch.equal(reader.read("lm_head.weight", 10, 5), model.lm_head.weight[10:15])
    assert (
        len(
            json.loads((tmp_path / "several" / "model.safetensors.index.json").read_bytes())[
                "weight_map"
            ]
        )
        > 4
    )
