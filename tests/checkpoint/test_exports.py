"""What other programs read of an export: names, shapes and dtypes of the source folder, and the
files beside the weights."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nexrl_storage.manifest import (
    describe,
    fingerprint_text,
    read_export,
    read_manifest,
    verify_files,
    write_manifest,
)
from nexrl_worker.checkpoint.model_files import MOST_BYTES
from nexrl_worker.rank.request import Refused
from nexrl_worker.training import fingerprint_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers.engines import MemoryRows, save_model
from tests.helpers.older_transformers import auto_class, run
from tests.helpers.one_group import Group
from tests.helpers.single_rank import compute

SMALL: dict[str, Any] = dict(
    vocab_size=61, hidden_size=32, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4,
    head_dim=8,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
EXPERTS: dict[str, Any] = dict(
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4,
    num_experts_per_tok=2, moe_k=2, moe_topk=2,
    moe_intermediate_size=12, shared_expert_intermediate_size=12, n_shared_experts=1, n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
)  # fmt: skip
LATENT: dict[str, Any] = dict(
    num_key_value_heads=4,
    kv_lora_rank=8,
    q_lora_rank=8,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
)
EYES: dict[str, Any] = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)
FAMILIES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "minimax", "granitemoe"), EXPERTS
    ),
    **dict.fromkeys(("glm4_moe", "dots1", "ernie4_5_moe", "hunyuan_v1_moe", "flex_olmo"), EXPERTS),
    "deepseek_v2": {**EXPERTS, **LATENT},
    "deepseek_v3": {**EXPERTS, **LATENT},
    "gpt_neox": {},
    "llama": {},
    # Of these the text is trained; what reads images travels along.
    "llava": {
        "text_config": {**SMALL, "model_type": "llama"},
        "vision_config": {**EYES, "model_type": "clip_vision_model"},
        "image_token_index": 60,
    },
    "qwen2_vl": {
        "text_config": {**SMALL, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        "vision_config": {
            "depth": 1,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "patch_size": 14,
        },
    },
    "llama4": {
        "text_config": {
            **SMALL,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 28,
            "layer_types": ["full_attention"] * 2,
            "no_rope_layers": [1, 1],
            "interleave_moe_layer_step": 2,
        },
        "vision_config": {
            **EYES,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
    },
    "mllama": {
        "text_config": {
            **SMALL,
            "cross_attention_layers": [1],
            "rope_scaling": {"rope_type": "default"},
        },
        "vision_config": {
            **EYES,
            "num_global_layers": 1,
            "attention_heads": 2,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 32,
            "supported_aspect_ratios": [[1, 1]],
            "max_num_tiles": 1,
        },
    },
}
IDS = [3, 17, 44, 8, 21, 60, 5, 33]
FORMS = ("sync", "current", "checkpoint")


@dataclass
class Exported:
    """What a group of one family left: before its first step, and in every form after it."""

    group: Group
    untrained: Path
    after: dict[str, Path]

    def scores(self) -> Tensor:
        """The group's log-probabilities of `IDS`."""
        ids = torch.tensor([IDS])
        rows = MemoryRows(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, temperature=1.0
        )
        return compute(self.group.engine, "compute_log_prob", rows)["old_log_probs"][0]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of each family as transformers 4.57 saves it; one rank is there."""
    folder = tmp_path_factory.mktemp("sources")
    given = {name: {"model_type": name, **SMALL, **keys} for name, keys in FAMILIES.items()}
    run("make", str(folder), given=json.dumps(given))
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=0, world_size=1
    )
    yield folder
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def exports(sources: Path) -> dict[str, Exported]:
    made = {}
    for name in FAMILIES:
        folder = sources / "groups" / name
        group = Group(folder, "actor", str(sources / name))
        untrained = group.save(folder / "untrained", sharded=False)
        group.learn()
        after = {
            "sync": group.save(folder / "sync", sharded=False),
            "current": group.convert(folder / "current"),
            "checkpoint": group.convert(group.save(folder / "step", sharded=True)),
        }
        made[name] = Exported(group, untrained, after)
    return made


def layout(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of every tensor, by its name in the folder's one file."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}


def fingerprint(folder: Path) -> str:
    return fingerprint_text(fingerprint_of(load_file(folder / "model.safetensors").items()))


def said(folder: Path) -> str:
    """The fingerprint that the file carries."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return str(file.metadata()["fingerprint"])


@pytest.mark.parametrize("family", FAMILIES)
def test_names_cuts_and_dtypes_are_those_of_the_source(
    sources: Path, exports: dict[str, Exported], family: str
) -> None:
    """In every form; all three hold the same weights, and each file says which, as anyone can
    recompute."""
    wanted = layout(sources / family)
    for folder in exports[family].after.values():
        assert layout(folder) == wanted
        record = read_export(folder)
        assert record is not None and said(folder) == record.fingerprint == fingerprint(folder)
        verify_files(folder, record.files)
    assert len({fingerprint(folder) for folder in exports[family].after.values()}) == 1
    assert fingerprint(exports[family].untrained) != fingerprint(exports[family].after["sync"])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_is_what_save_pretrained_writes(
    sources: Path, exports: dict[str, Exported], tmp_path: Path, family: str
) -> None:
    """Of the model that `from_pretrained` makes of the same folder: the same names, shapes, dtypes
    and bits."""
    auto_class(AutoConfig.from_pretrained(sources / family)).from_pretrained(
        sources / family
    ).save_pretrained(tmp_path)
    wanted, found = (
        load_file(folder / "model.safetensors") for folder in (tmp_path, exports[family].untrained)
    )
    assert layout(exports[family].untrained) == layout(tmp_path)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_transformers_4_57_reads_every_export(exports: dict[str, Exported]) -> None:
    """It fills nothing at random, leaves nothing out, and scores a row as the group does."""
    folders = {
        str(path): made
        for made in exports.values()
        for path in (made.untrained, made.after["checkpoint"])
    }
    found = run("score", json.dumps(IDS), *folders)
    for name, made in exports.items():
        trained, untrained = (
            torch.tensor(found[str(path)], dtype=torch.float64)
            for path in (made.after["checkpoint"], made.untrained)
        )
        assert torch.allclose(trained, made.scores().double(), atol=1e-5, rtol=0), name
        assert (trained - untrained).abs().max() > 1e-3, name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "ernie4_5_moe", "gpt_neox"])
def test_an_export_loads_into_a_group(
    exports: dict[str, Exported], sources: Path, family: str, form: str
) -> None:
    """Experts one by one become the model's fused ones again, to the bit."""
    group = Group(sources / "again", "actor", str(sources / family))
    found = group.load(exports[family].after[form])
    assert (found["kind"], found["dtype"]) == ("huggingface", "float32")
    assert group.engine.state.fingerprint() == exports[family].group.engine.state.fingerprint()


def test_no_rank_holds_a_whole_mixture_of_experts(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exports: dict[str, Exported]
) -> None:
    """Its folder is read and converted layer by layer; transformers would make all of it on every
    rank."""
    monkeypatch.delattr(AutoModelForCausalLM, "from_pretrained")
    for family in ("mixtral", "deepseek_v3", "ernie4_5_moe"):
        fresh = Group(tmp_path, "actor", str(sources / family))
        record = read_export(exports[family].untrained)
        assert (
            record is not None
            and fingerprint_text(fresh.engine.state.fingerprint()) == record.master_fingerprint
        )


def half(folder: Path) -> str:
    """A tiny Qwen2 of bfloat16 whose norms are float32."""
    save_model(folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: value if "norm" in name else value.bfloat16() for name, value in weights.items()}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return str(folder)


@pytest.mark.usefixtures("sources")
@pytest.mark.parametrize("form", FORMS)
def test_an_export_has_the_dtypes_of_the_source(tmp_path: Path, form: str) -> None:
    """Of each tensor; the configuration agrees, and the fingerprint is of what lies there, the
    group's own beside it."""
    group = Group(tmp_path, "actor", half(tmp_path / "model"))
    group.learn()
    folder = tmp_path / "export"
    if form == "sync":
        group.save(folder, sharded=False)
    else:
        folder = group.convert(group.save(folder, sharded=True) if form == "checkpoint" else folder)
    assert layout(folder) == layout(tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    record = read_export(folder)
    assert record is not None and said(folder) == record.fingerprint == fingerprint(folder)
    assert (
        record.master_fingerprint
        == fingerprint_text(group.engine.state.fingerprint())
        != record.fingerprint
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16


@pytest.mark.usefixtures("sources")
def test_weights_in_bfloat16_load_and_are_called_so(tmp_path: Path) -> None:
    """A group takes them as they are, rounded, and says what they were."""
    path = half(tmp_path / "model")
    trained, group = Group(tmp_path, "actor", path), Group(tmp_path, "actor", path)
    trained.learn()
    export = trained.save(tmp_path / "export", sharded=False)
    assert group.load(export)["dtype"] == "bfloat16, float32"
    again = group.save(tmp_path / "again", sharded=False)
    assert fingerprint(again) == fingerprint(export)


@pytest.mark.usefixtures("sources")
@pytest.mark.parametrize("form", FORMS)
def test_export_dtype_overrides_the_source(tmp_path: Path, form: str) -> None:
    group = Group(tmp_path, "actor", half(tmp_path / "model"), export_dtype="float32")
    folder = tmp_path / "export"
    if form == "sync":
        group.save(folder, sharded=False)
    else:
        folder = group.convert(group.save(folder, sharded=True) if form == "checkpoint" else folder)
    assert {dtype for dtype, _ in layout(folder).values()} == {"F32"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert fingerprint(folder) == fingerprint_text(group.engine.state.fingerprint())


@pytest.mark.usefixtures("sources")
def test_a_new_head_has_the_dtype_of_most_of_the_source(tmp_path: Path) -> None:
    """Of the weights that are taken from it: what it keeps beside them for another purpose does not
    count."""
    model = half(tmp_path / "model")
    weights = load_file(Path(model) / "model.safetensors")
    more = {f"mtp.{name}": torch.ones(1) for name in weights}
    save_file({**weights, **more}, Path(model) / "model.safetensors", {"format": "pt"})
    found = layout(Group(tmp_path, "critic", model).save(tmp_path / "export", sharded=False))
    assert (found["score.weight"][0], found["model.norm.weight"][0]) == ("BF16", "F32")


@pytest.mark.usefixtures("sources")
@pytest.mark.parametrize("how", ["said", "unsaid"])
def test_quantised_weights_are_not_loaded_as_if_they_were_none(tmp_path: Path, how: str) -> None:
    """Of a folder that says so, and of one whose tensors do; the weights stay."""
    group = Group(tmp_path, "actor", save_model(tmp_path / "model"))
    path = Path(save_model(tmp_path / "quantised"))
    weights = load_file(path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    if how == "said":
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
        (path / "config.json").write_text(json.dumps(config))
        weights[name] = weights[name].mul(100).to(torch.int8)
    else:
        weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    before = group.engine.state.fingerprint()
    with pytest.raises(Refused, match="quantised") as caught:
        group.load(path)
    assert caught.value.code == "CHECKPOINT_INVALID" and group.engine.state.fingerprint() == before


@pytest.mark.usefixtures("sources")
def test_what_float16_cannot_hold_is_not_exported_as_infinity(tmp_path: Path) -> None:
    """The tensor is named and nothing is left behind; the group goes on."""
    model = half(tmp_path / "model")
    weights = load_file(Path(model) / "model.safetensors")
    weights["model.norm.weight"][3] = 1e6
    save_file(weights, Path(model) / "model.safetensors", {"format": "pt"})
    group = Group(tmp_path, "actor", model, export_dtype="float16")
    with pytest.raises(Refused, match=r"model\.norm\.weight"):
        group.save(tmp_path / "export", sharded=False)
    assert not (tmp_path / "export").exists() and not list(tmp_path.glob(".export*"))


@pytest.mark.usefixtures("sources")
def test_checkpoints_from_before_the_source_was_kept_are_converted(
    tmp_path: Path, sources: Path
) -> None:
    """Into the dtype that the configuration names, under the names that transformers gives a model
    by default."""
    group = Group(tmp_path, "actor", str(sources / "mixtral"))
    step = group.save(tmp_path / "step", sharded=True)
    state = json.loads((step / "state.json").read_text())
    assert state.pop("source")
    (step / "state.json").write_text(json.dumps(state))
    manifest = read_manifest(step)
    assert manifest is not None
    files = tuple(
        describe(step, file.name) if file.name == "state.json" else file for file in manifest.files
    )
    write_manifest(step, manifest.model_copy(update={"files": files}))
    assert layout(group.convert(step)) == layout(sources / "mixtral")


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_a_checkpoint_of_another_model_is_converted_as_its_own_group_would(
    sources: Path, tmp_path: Path, role: str
) -> None:
    """A critic of a family that transformers has no class for among them."""
    family = {"actor": "mixtral", "critic": "olmoe"}[role]
    of = Group(tmp_path, role, str(sources / family))
    step = of.save(tmp_path / "step", sharded=True)
    other = Group(tmp_path, "actor", str(sources / "llama"))
    wanted = layout(of.save(tmp_path / "sync", sharded=False))
    assert layout(other.convert(step)) == wanted
    lacking = {"lm_head.weight"} if role == "critic" else set()
    heads = {"score.weight", "score.bias"} if role == "critic" else set()
    assert wanted.keys() == layout(sources / family).keys() - lacking | heads


TRAVEL = {
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json", "additional_chat_templates/tool_use.jinja",
    "additional_chat_templates/rag.jinja",
    "tokenizer.model.v3", "tekken.json", "qwen.tiktoken", "vocab.bpe", "merges.txt", "target.spm",
    "added_tokens.json",
    "generation_config.json", "LICENSE", "tokenizer_config.json", "anything.of.tomorrow",
}  # fmt: skip
STAY = {
    "pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "tf_model.h5",
    "model.gguf",
    "modeling_custom.py", "tokenization_custom.py", "README.md", "trainer_state.json",
    "adapter_config.json",
    "hf_quant_config.json", ".gitattributes", "nexrl.json", "onnx/model.onnx",
    "checkpoint-5/config.json",
}  # fmt: skip


@pytest.mark.usefixtures("sources")
@pytest.mark.parametrize("form", FORMS)
def test_small_files_travel_and_weights_and_code_stay(tmp_path: Path, form: str) -> None:
    """Processors, templates and whatever a tokenizer needs; nothing that speaks of other
    weights."""
    model = Path(save_model(tmp_path / "model"))
    for name in TRAVEL | STAY:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("{}")
    os.truncate(model / "anything.of.tomorrow", 100)
    with open(model / "huge.dat", "wb") as huge:
        huge.truncate(MOST_BYTES + 1)
    group = Group(tmp_path, "actor", str(model))
    folder = tmp_path / "export"
    if form == "sync":
        group.save(folder, sharded=False)
    else:
        folder = group.convert(group.save(folder, sharded=True) if form == "checkpoint" else folder)
    there = {
        str(path.relative_to(folder.resolve()))
        for path in folder.resolve().rglob("*")
        if path.is_file()
    }
    assert there == TRAVEL | {"config.json", "model.safetensors", "nexrl.json"}
    record = read_export(folder)
    assert record is not None and {entry.name for entry in record.files} == there - {"nexrl.json"}
    if form == "sync":
        for _ in range(2):
            group.save(folder, sharded=False)
        assert sorted(path.name for path in tmp_path.glob(".export.v*")) == [
            ".export.v2",
            ".export.v3",
        ]
