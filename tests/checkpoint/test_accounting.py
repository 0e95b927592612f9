"""Every tensor and every promise of a folder is accounted for: computed as transformers does, or
refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace as Space
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nexrl_contract.errors import ServiceError
from nexrl_worker.rank.model_folder import check_model_folder
from nexrl_worker.rank.request import Refused
from nexrl_worker.snapshot import Snapshot
from nexrl_worker.training import InvalidValue
from nexrl_worker.training.model.quantised import Dequantised
from nexrl_worker.training.model.weight_sources import folder_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    GptOssConfig,
    GptOssForCausalLM,
    Mxfp4Config,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.helpers.engines import MemoryRows, save_model
from tests.helpers.one_group import Group
from tests.helpers.single_rank import build, compute

Tensors = dict[str, Tensor]
IDS = torch.tensor([[3, 17, 44, 8, 21, 60, 5, 33]])
UP = "model.layers.0.mlp.up_proj.weight"
FP8 = {"quant_method": "fp8", "weight_block_size": [8, 8], "activation_scheme": "dynamic"}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4977169568\n"


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Llama with a head of its own, a Qwen2 with a tied one; one rank is there."""
    folder = tmp_path_factory.mktemp("models")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=0, world_size=1
    )
    save_model(folder / "llama", "llama", hidden_size=32, intermediate_size=40)
    save_model(folder / "qwen2")
    yield folder
    dist.destroy_process_group()


def changed(
    model: Path,
    folder: Path,
    change: Callable[[Tensors], Any] = lambda tensors: None,
    **config: Any,
) -> str:
    """A copy of the model's folder with other tensors and other keys in its configuration."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(
        {name: part.contiguous() for name, part in tensors.items()}, folder / "model.safetensors"
    )
    known = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({**known, **config}))
    return str(folder)


def scores(path: str, **changes: Any) -> Tensor:
    """Log-probabilities of `IDS` by a group made of that folder."""
    rows = MemoryRows({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, temperature=1.0)
    return compute(build(path, **changes), "compute_log_prob", rows)["old_log_probs"][0].double()


@torch.no_grad()
def plain(path: str, **more: Any) -> Tensor:
    """The same by transformers."""
    model = AutoModelForCausalLM.from_pretrained(path, **{"dtype": torch.float64, **more}).eval()
    found = torch.log_softmax(model(IDS).logits.double(), dim=-1)
    return found[0, :-1].gather(1, IDS[0, 1:, None])[:, 0]


def linear(tensors: Tensors) -> list[str]:
    return [name for name in tensors if name.endswith("_proj.weight")]


def in_blocks(tensors: Tensors, end: str, block: tuple[int, int]) -> Tensors:
    """Quantise all linear layers to float8 with a scale for each block; what they then stand for,
    in float64."""
    truth = {}
    for name in linear(tensors):
        weight = tensors[name]
        rows, columns = (-(-side // size) for side, size in zip(weight.shape, block, strict=True))
        scale = torch.rand(rows, columns) * 0.01 + 0.001
        wide = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[
            : len(weight), : weight.shape[1]
        ]
        tensors[name] = (weight / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[name + end] = scale
        truth[name] = tensors[name].double() * wide.double()
    return truth


def per_tensor(tensors: Tensors) -> Tensors:
    truth = {}
    for name in linear(tensors):
        scale = tensors[name].abs().max() / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[name + "_scale"] = scale
        tensors[name.removesuffix("weight") + "input_scale"] = torch.tensor(0.5)
        truth[name] = tensors[name].double() * scale.double()
    return truth


def per_row(tensors: Tensors) -> Tensors:
    truth = {}
    for name in linear(tensors):
        most = tensors[name].abs().amax(dim=1)
        tensors[name] = (tensors[name] * 127 / most[:, None]).round().to(torch.int8)
        tensors[name.removesuffix("weight") + "SCB"] = most
        tensors[name.removesuffix("weight") + "weight_format"] = torch.tensor(0, dtype=torch.uint8)
        truth[name] = tensors[name].double() * most.double()[:, None] / 127
    return truth


def in_groups(tensors: Tensors, group: int | None, asymmetric: bool = False) -> Tensors:
    """int8 as compressed-tensors has it: a scale for each row, or for each `group` of its numbers,
    maybe a zero point."""
    truth = {}
    for name in linear(tensors):
        weight = tensors[name]
        count = 1 if group is None else weight.shape[1] // group
        parts = weight.reshape(len(weight), count, -1)
        scale = parts.abs().amax(dim=-1) / 100
        zero = torch.randint(-20, 20, scale.shape) if asymmetric else torch.zeros_like(scale)
        found = (parts / scale[..., None] + zero[..., None]).round().clamp(-128, 127)
        tensors[name], tensors[name + "_scale"] = found.reshape(weight.shape).to(torch.int8), scale
        if asymmetric:
            tensors[name + "_zero_point"] = zero.to(torch.int8)
        truth[name] = ((found - zero[..., None]).double() * scale[..., None].double()).reshape(
            weight.shape
        )
    return truth


QUANTISED: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any]]] = {
    "float8 in blocks that do not divide it": (
        lambda tensors: in_blocks(tensors, "_scale_inv", (12, 12)),
        {**FP8, "weight_block_size": [12, 12]},
    ),
    "float8 with a scale for each row": (
        lambda tensors: in_blocks(tensors, "_scale", (1, 1000)),
        {"quant_method": "compressed-tensors"},
    ),
    "float8 with one scale": (per_tensor, {"quant_method": "fp8", "activation_scheme": "static"}),
    "int8 of bitsandbytes": (per_row, INT8),
    "int8 with a scale for each row": (
        lambda tensors: in_groups(tensors, None),
        {"quant_method": "compressed-tensors", "format": "int-quantized"},
    ),
    "int8 in groups with zero points": (
        lambda tensors: in_groups(tensors, 8, asymmetric=True),
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"format": (
            "naive-quantized"
)}}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", QUANTISED)
def test_quantised_weights_are_what_their_scales_make_of_them(
    models: Path, tmp_path: Path, case: str
) -> None:
    """Trained, exported without a word of the quantisation, and loaded into a running group: one
    and the same model."""
    quantise, said = QUANTISED[case]
    truth: Tensors = {}
    path = changed(
        models / "llama",
        tmp_path / "it",
        lambda ones: truth.update(quantise(ones)),
        quantization_config=said,
    )
    whole = changed(models / "llama", tmp_path / "whole", lambda tensors: tensors.update(truth))
    expected = plain(whole)

    assert (scores(path) - expected).abs().max() < 1e-5

    group = Group(tmp_path, "actor", path)
    export = group.save(tmp_path / "export", sharded=False)
    assert "quantization_config" not in json.loads((export / "config.json").read_bytes())
    assert (plain(str(export)) - expected).abs().max() < 1e-5
    other = Group(tmp_path, "actor", str(models / "llama"))
    other.load(Path(path))
    assert other.engine.state.fingerprint() == group.engine.state.fingerprint()


def test_any_rows_of_a_quantised_tensor_have_their_own_scales(models: Path, tmp_path: Path) -> None:
    """A rank reads a part that begins and ends within blocks."""
    truth: Tensors = {}
    path = changed(
        models / "llama", tmp_path / "it",
        lambda ones: truth.update(in_blocks(ones, "_scale_inv", (12, 12))),
        quantization_config={**FP8, "weight_block_size": [12, 12]},
    )  # fmt: skip
    folder = folder_tensors(path)
    assert isinstance(folder, Dequantised)
    for first, count in ((0, 40), (5, 9), (11, 2), (39, 1), (40, 0)):
        assert torch.allclose(
            folder.read(UP, first, count).double(), truth[UP][first : first + count], rtol=1e-6
        )


def test_quantised_experts_are_those_that_transformers_makes(tmp_path: Path) -> None:
    """Converted and de-quantised at once."""
    torch.manual_seed(1)
    config = Qwen3MoeConfig(
        vocab_size=61, hidden_size=32, intermediate_size=32, moe_intermediate_size=16,
        num_hidden_layers=2, num_experts=4,
        num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        initializer_range=0.3,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "plain")
    path = changed(
        tmp_path / "plain",
        tmp_path / "it",
        lambda tensors: in_blocks(tensors, "_scale_inv", (8, 8)),
        quantization_config=FP8,
    )

    theirs = plain(
        path, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    )

    assert (scores(path, dtype="float32") - theirs).abs().max() < 1e-4


def in_pairs(tensors: Tensors) -> None:
    """Experts as gpt-oss has them: two numbers of 4 bits in each byte, an exponent for 32 of
    them."""
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        random = torch.Generator().manual_seed(len(tensors))
        shape = (experts, rows, columns // 32)
        tensors[name + "_blocks"] = torch.randint(0, 256, (*shape, 16), generator=random).to(
            torch.uint8
        )
        tensors[name + "_scales"] = torch.randint(120, 126, shape, generator=random).to(torch.uint8)


def gpt_oss(tmp_path: Path) -> tuple[str, Path]:
    """A folder in mxfp4, and the same before it was made so."""
    torch.manual_seed(1)
    config = GptOssConfig(
        vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_local_experts=3,
        num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"], initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    GptOssForCausalLM(config).save_pretrained(tmp_path / "plain")
    said = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
    }
    return changed(
        tmp_path / "plain", tmp_path / "it", in_pairs, quantization_config=said
    ), tmp_path / "plain"


def test_experts_in_mxfp4_are_those_that_transformers_makes(tmp_path: Path) -> None:
    """Trained from, exported whole, and loaded into a running group; a rank reads its experts
    alone."""
    path, plain_folder = gpt_oss(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    )
    name = "model.layers.1.mlp.experts.gate_up_proj"
    wanted = theirs.state_dict()[name]
    folder = folder_tensors(path)
    assert folder.shapes[name] == tuple(wanted.shape)
    assert all(torch.equal(folder.read(name, at, 1)[0], wanted[at]) for at in range(3))

    group = Group(tmp_path, "actor", path)
    export = group.save(tmp_path / "export", sharded=False)
    found, whole = load_file(export / "model.safetensors"), theirs.state_dict()
    assert found.keys() == whole.keys() == load_file(plain_folder / "model.safetensors").keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    expected = plain(str(export), dtype=torch.float32)
    assert (scores(path, dtype="float32") - expected).abs().max() < 1e-4
    other = Group(tmp_path, "actor", str(plain_folder))
    other.load(Path(path))
    assert other.engine.state.fingerprint() == group.engine.state.fingerprint()


@pytest.mark.parametrize(
    "method", ["gptq", "awq", "hqq", "torchao", "compressed-tensors pack-quantized"]
)
def test_a_quantisation_that_is_not_known_is_refused_by_name(
    models: Path, tmp_path: Path, method: str
) -> None:
    name, _, form = method.partition(" ")
    said = {"quant_method": name, "bits": 4, "config_groups": {"group_0": {"format": form}}}
    path = changed(models / "llama", tmp_path / "it", quantization_config=said)
    with pytest.raises(InvalidValue, match=f"quantization_config says {method}"):
        build(path)
    with pytest.raises(Refused, match=f"quantization_config says {method}"):
        Group(tmp_path, "actor", str(models / "llama")).load(Path(path))


def without(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


def with_(name: str, tensor: Tensor) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: tensor})


def of_dtype(dtype: torch.dtype) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({UP: tensors[UP].to(dtype)})


def with_number(value: float) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors[UP][5].fill_(value)


WRONG: dict[str, tuple[Callable[[Tensors], Any], dict[str, Any], str]] = {
    "float8 without a scale": (of_dtype(torch.float8_e4m3fn), {"quantization_config": FP8}, UP),
    "float8 of no quantisation": (
        lambda ones: in_blocks(ones, "_scale_inv", (8, 8)),
        {},
        ("no quantization_config"),
    ),
    "integers": (of_dtype(torch.int8), {}, UP),
    "integers without a scale": (of_dtype(torch.int8), {"quantization_config": INT8}, UP),
    "scales of another shape": (
        lambda ones: (
            in_blocks(ones, "_scale_inv", (8, 8)),
            ones.update({UP + "_scale_inv": torch.ones(3, 3)}),
        ),
        {"quantization_config": FP8},
        UP + "_scale_inv",
    ),
    "a tensor of nothing": (
        with_("model.layers.1.mlp.gate.weight", torch.ones(4)),
        {},
        ("model.layers.1.mlp.gate.weight"),
    ),
    "a bias that the model lacks": (with_(UP[:-6] + "bias", torch.ones(40)), {}, UP[:-6] + "bias"),
    "layers of nothing": (
        lambda ones: None,
        {"num_hidden_layers": 1},
        (r"layers up to 1, but num_hidden_layers is 1"),
    ),
    "layers without weights": (
        lambda ones: None,
        {"num_hidden_layers": 3},
        (r"lack model\.layers\.2\."),
    ),
    "no weights": (without(UP), {}, f"lack {UP}"),
    "no head": (without("lm_head.weight"), {}, "lack lm_head.weight"),
    "another width": (lambda ones: None, {"intermediate_size": 44}, "has shape"),
    "zero points of another shape": (
        lambda ones: (
            in_groups(ones, 8),
            ones.update({UP + "_zero_point": torch.zeros(3, dtype=torch.int8)}),
        ),
        {"quantization_config": {"quant_method": "compressed-tensors"}},
        UP + "_zero_point",
    ),
    "pairs without exponents": (
        lambda ones: ones.update({UP + "_blocks": torch.zeros(1, 2, 1, 16, dtype=torch.uint8)}),
        {"quantization_config": {"quant_method": "mxfp4"}},
        f"{UP}_blocks and {UP}_scales",
    ),
    "not a number": (with_number(float("nan")), {}, rf"{UP} holds NaN or infinity \(row 5\)"),
    "infinity": (with_number(float("-inf")), {}, rf"{UP} holds NaN or infinity \(row 5\)"),
    "a head for something else": (with_("score.weight", torch.ones(1, 32)), {}, "score.weight"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_has_no_place_or_no_source_is_refused_by_name(
    models: Path, tmp_path: Path, case: str
) -> None:
    """As a group's model, as its frozen reference, and as a checkpoint, which then changes
    nothing."""
    change, config, named = WRONG[case]
    path = changed(models / "llama", tmp_path / "it", change, **config)
    with pytest.raises(InvalidValue, match=named):
        build(path)
    group = Group(tmp_path, "actor", str(models / "llama"), ref=Space(model=Space(path=path)))
    before = group.state()
    with pytest.raises(InvalidValue, match=named):
        group.engine.frozen.load()
    if (
        "num_hidden_layers" in config or "intermediate_size" in config
    ):  # of the folder's tensors alone, these fit
        return
    with pytest.raises(Refused, match=named) as caught:
        group.load(Path(path))
    assert caught.value.code == "CHECKPOINT_INVALID" and group.state() == before


def test_a_head_of_its_own_is_kept_though_the_configuration_ties_it(
    models: Path, tmp_path: Path
) -> None:
    """As transformers loads it; the export says that they are two and has both."""
    own = torch.randn(61, 24, generator=torch.Generator().manual_seed(5))
    path = changed(models / "qwen2", tmp_path / "it", with_("lm_head.weight", own))
    expected = plain(path)
    assert (scores(path) - expected).abs().max() < 1e-5

    group = Group(tmp_path, "actor", path)
    for export in (
        group.save(tmp_path / "one", sharded=False),
        group.convert(group.save(tmp_path / "two", sharded=True)),
    ):
        assert json.loads((export / "config.json").read_bytes())["tie_word_embeddings"] is False
        assert torch.equal(load_file(export / "model.safetensors")["lm_head.weight"], own)
        assert (plain(str(export)) - expected).abs().max() < 1e-5
    with pytest.raises(Refused, match="head"):
        Group(tmp_path, "actor", str(models / "qwen2")).load(Path(path))


def test_a_checkpoint_of_more_layers_is_refused(models: Path, tmp_path: Path) -> None:
    """A sharded one too: all that the group needs is in it, and more."""
    saved = Group(tmp_path, "actor", str(models / "llama")).save(tmp_path / "saved", sharded=True)
    group = Group(
        tmp_path,
        "actor",
        save_model(
            tmp_path / "one", "llama", hidden_size=32, intermediate_size=40, num_hidden_layers=1
        ),
    )
    before = group.state()
    with pytest.raises(Refused, match=r"holds model\.layers\.1\..*no place"):
        group.load(saved)
    assert group.state() == before


@pytest.mark.parametrize("spoiled", [UP, f"optim.exp_avg.{UP}"])
def test_a_sharded_checkpoint_that_holds_nan_is_refused_by_the_tensor(
    models: Path, tmp_path: Path, spoiled: str
) -> None:
    """A weight, or a moment, which would be in the weights a step later; without the moments it
    loads. Kept state comes back."""
    group = Group(tmp_path, "actor", str(models / "llama"))
    group.learn()
    shards = {part.name: part.local_tensor for part in group.engine.state.shards()}
    shards[spoiled][5, 3] = float("nan")
    saved = group.save(tmp_path / "saved", sharded=True)
    group.checkpoints.suspend(group.engine.state, Snapshot(seq=1))

    other = Group(tmp_path, "actor", str(models / "llama"))
    before = other.state()
    with pytest.raises(Refused, match=f"{spoiled} holds NaN") as caught:
        other.load(saved)
    assert (caught.value.code, caught.value.details["tensor"], caught.value.details["rank"]) == (
        "CHECKPOINT_INVALID", spoiled, 0,
    )  # fmt: skip
    assert other.state() == before
    if spoiled != UP:
        other.load(saved, weight_only=True)
    assert other.checkpoints.resume(other.engine.state).seq == 1
    assert other.engine.state.fingerprint() == group.engine.state.fingerprint()


@pytest.mark.parametrize("only", ["head", "both"])
def test_a_head_that_is_the_embedding_stays_tied(models: Path, tmp_path: Path, only: str) -> None:
    """Also where the files have it under the head's name alone."""

    def change(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if only == "head":
            del tensors["model.embed_tokens.weight"]

    path = changed(models / "qwen2", tmp_path / "it", change)
    assert (scores(path) - plain(path)).abs().max() < 1e-5
    assert build(path).state.fingerprint() == build(str(models / "qwen2")).state.fingerprint()
    group = Group(tmp_path, "actor", path)
    export = group.save(tmp_path / "export", sharded=False)
    assert json.loads((export / "config.json").read_bytes())["tie_word_embeddings"] is True
    group.load(Path(path))


def test_what_transformers_leaves_out_is_left_out(models: Path, tmp_path: Path) -> None:
    """Frequencies that older versions saved, and layers that predict further tokens."""

    def change(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["model.layers.2.eh_proj.weight"] = torch.ones(4, 4)

    path = changed(models / "llama", tmp_path / "it", change, num_nextn_predict_layers=1)
    assert torch.equal(scores(path), scores(str(models / "llama")))
    build(str(models / "llama"), "critic")  # its output head has no place there


def in_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
        save_file(
            {name: tensors[name] for name in names},
            folder / f"model-0000{number}-of-00002.safetensors",
        )


def with_index(folder: Path) -> None:
    in_shards(folder)
    named = {"a": "model-00001-of-00002.safetensors", "b": "model-00003-of-00003.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))


def saying(quantised: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        known = json.loads((folder / "config.json").read_bytes())
        (folder / "config.json").write_text(json.dumps({**known, "quantization_config": quantised}))

    return change


def replaced(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


def cut_to(folder: Path, size: int) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:size])


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shards without an index": (
        in_shards,
        "2 safetensors files .* but no model.safetensors.index.json",
    ),
    "an index of missing files": (
        with_index,
        "model-00003-of-00003.safetensors is missing, but the index names it",
    ),
    "a pointer": (
        replaced("model.safetensors", POINTER),
        "model.safetensors cannot be read: it is a Git LFS pointer",
    ),
    "a list for a quantisation": (saying(["fp8"]), "quantization_config is no mapping"),
    "nothing for a quantisation": (saying([]), "quantization_config is no mapping"),
    "a pointer for a configuration": (
        replaced("config.json", POINTER),
        "config.json.*it is a Git LFS pointer",
    ),
    "a web page": (replaced("model.safetensors", "<!DOCTYPE html><html>"), "it is a web page"),
    "nothing": (replaced("model.safetensors", ""), "it is empty"),
    "a part of the header": (
        lambda folder: cut_to(folder, 50),
        "it is cut short: its header alone needs more than its 50",
    ),
    "a part": (
        lambda folder: cut_to(folder, 20_000),
        r"it is cut short: 20000 of \d+ bytes are there",
    ),
}


def test_a_pointer_for_a_tokenizer_is_said(models: Path, tmp_path: Path) -> None:
    """No weight hangs on it, but every export would carry it along."""
    shutil.copytree(models / "llama", tmp_path / "it")
    (tmp_path / "it" / "tokenizer.json").write_text(POINTER)
    with pytest.raises(
        ServiceError, match=r"tokenizer\.json cannot be read: it is a Git LFS pointer"
    ):
        check_model_folder(str(tmp_path / "it"), "actor")


@pytest.mark.parametrize("case", BROKEN)
def test_what_a_folder_has_instead_of_files_is_said(
    models: Path, tmp_path: Path, case: str
) -> None:
    """In one line, before anything is built and before anything is loaded."""
    change, said = BROKEN[case]
    shutil.copytree(models / "llama", tmp_path / "it")
    change(tmp_path / "it")
    with pytest.raises(ServiceError, match=said) as caught:
        check_model_folder(str(tmp_path / "it"), "actor")
    assert caught.value.code == "INVALID_CONFIG" and "\n" not in caught.value.message
    with pytest.raises(Refused, match=said) as caught:
        Group(tmp_path, "actor", str(models / "llama")).load(tmp_path / "it")
    assert caught.value.code == "CHECKPOINT_INVALID" and "\n" not in caught.value.message
