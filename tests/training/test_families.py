"""One rank in this process: model families, the probe of their logits, and what the package
imports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from nexrl_contract.errors import ServiceError
from nexrl_worker.checkpoint.huggingface import FolderWriter, Stamp, export
from nexrl_worker.rank.model_folder import check_models
from nexrl_worker.training import Engine, InvalidValue
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    BertConfig,
    BlipConfig,
    CohereConfig,
    ElectraConfig,
    FunnelConfig,
    Gemma2Config,
    Gemma3Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    Mistral3Config,
    MistralConfig,
    PretrainedConfig,
    Qwen2AudioConfig,
    Qwen2Config,
    Qwen3Config,
    ReformerConfig,
    T5Config,
    XLNetConfig,
    Zamba2Config,
)

from tests.helpers.engines import MemoryRows, batch, planned, save_model
from tests.helpers.single_rank import build, compute, update

COMMON = dict(
    vocab_size=61, hidden_size=24, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.02,
    pad_token_id=0,
)  # fmt: skip
FAMILIES: dict[str, tuple[PretrainedConfig, bool]] = {
    "llama": (LlamaConfig(**COMMON), True),
    "qwen2": (Qwen2Config(**{**COMMON, "tie_word_embeddings": True}), True),
    "qwen3": (Qwen3Config(**COMMON), True),
    "mistral": (MistralConfig(**COMMON), True),
    "gpt2": (GPT2Config(vocab_size=61, n_embd=24, n_layer=2, n_head=4, n_positions=64), True),
    "gemma": (GemmaConfig(**COMMON), True),
    "gemma2": (Gemma2Config(**COMMON), False),
    "cohere": (CohereConfig(**COMMON), False),
}


pytestmark = pytest.mark.usefixtures("one_rank")


def scored(engine: Engine, rows: MemoryRows) -> torch.Tensor:
    return compute(engine, "compute_log_prob", rows)["old_log_probs"]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_family(family: str, tmp_path: Path) -> None:
    """Each family scores as its own logits do, takes a step, is saved and loaded again; other
    logits are found out."""
    made, chunked = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made)
    model.save_pretrained(tmp_path / "first")
    cut = {"dtype": "float32", "ppo_micro_batch_size_per_gpu": 2}
    engine = build(str(tmp_path / "first"), **cut)
    info = engine.info()
    assert (
        info["chunked_log_probs"] is chunked
        and (info["chunked_log_probs_reason"] is None) is chunked
    )
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    rows = MemoryRows(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "advantages": torch.ones(2)},
        temperature=0.8,
    )
    assert torch.allclose(scored(engine, rows), own_scores(model, ids), atol=1e-5)
    before = engine.state.fingerprint()
    result = update(engine, rows)[0].metrics
    assert (
        result["step_applied"]
        and result["actor/grad_norm"] > 0
        and engine.state.fingerprint() != before
    )

    folder = tmp_path / "second"
    folder.mkdir()
    writer = FolderWriter(folder, tmp_path / "first", Stamp("family", 1, 1, "0" * 16))
    assert export(engine.state.full_weights(), writer) is None
    writer.finish()
    again = build(str(folder), **cut)
    assert again.state.fingerprint() == engine.state.fingerprint()
    trained = scored(engine, rows)
    assert torch.equal(scored(again, rows), trained)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.allclose(trained, own_scores(loaded, ids), atol=1e-5)


@torch.no_grad()
def own_scores(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [B,S-1] at temperature 0.8 by the family's own logits."""
    logs = torch.log_softmax(model.eval()(ids).logits.float() / 0.8, dim=-1)
    return logs[:, :-1].gather(2, ids[:, 1:, None])[..., 0]


EYES = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)
WIDER: dict[str, PretrainedConfig] = {
    "gemma3": Gemma3Config(
        text_config=dict(COMMON),
        vision_config=EYES,
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=58,
        eoi_token_index=59,
    ),
    "mistral3": Mistral3Config(
        text_config={**COMMON, "model_type": "mistral"},
        image_token_index=60,
        vision_config={**EYES, "head_dim": 8, "model_type": "pixtral"},
    ),
    "mamba": MambaConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=8, pad_token_id=0
    ),
    "bert as a decoder": BertConfig(**{**COMMON, "is_decoder": True}),
    # as wide as its head
    "electra as a decoder": ElectraConfig(**{**COMMON, "is_decoder": True, "embedding_size": 16}),
    "zamba2": Zamba2Config(  # two of its layers are one
        **{
            **COMMON,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid"] * 2,
            ("num_mem_blocks"): 1,
        },
        mamba_d_state=8,
        mamba_ngroups=1,
        n_mamba_heads=4,
        mamba_headdim=12,
        chunk_size=8,
        adapter_rank=4,
        use_mamba_kernels=False,
    ),
    "qwen2_audio": Qwen2AudioConfig(
        text_config={**COMMON, "model_type": "qwen2"},
        audio_token_index=60,
        audio_config=dict(
            model_type="qwen2_audio_encoder",
            d_model=16,
            encoder_layers=1,
            encoder_attention_heads=2,
            encoder_ffn_dim=24,
            num_mel_bins=16,
            max_source_positions=20,
        ),
    ),
}


@pytest.mark.parametrize("family", WIDER)
def test_text_of_families_that_do_more_or_remember(family: str, tmp_path: Path) -> None:
    """Rows of two lengths score as transformers scores each alone; a step later the export holds
    every part, changed or not."""
    made = WIDER[family]
    auto = AutoModelForMultimodalLM if made.get_text_config() is not made else AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(made)
    model.save_pretrained(tmp_path / "first")
    check_models(
        "actor", {"model": {"path": str(tmp_path / "first")}, "ref": {"model": {"path": None}}}
    )
    engine = build(str(tmp_path / "first"), dtype="float32")
    ids = torch.randint(3, 57, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    rows = MemoryRows(
        {"input_ids": ids, "attention_mask": mask, "advantages": torch.ones(2)}, temperature=0.8
    )

    def same(answered: torch.Tensor, by: torch.nn.Module) -> bool:
        alone = own_scores(by, ids[:1])[0], own_scores(by, ids[1:, :6])[0]
        return all(
            torch.allclose(answered[row, : len(own)], own, atol=1e-5)
            for row, own in enumerate(alone)
        )

    assert same(scored(engine, rows), model)
    assert update(engine, rows)[0].metrics["step_applied"]

    folder = tmp_path / "second"
    folder.mkdir()
    writer = FolderWriter(folder, tmp_path / "first", Stamp("family", 1, 1, "0" * 16))
    assert export(engine.state.full_weights(), writer) is None
    writer.finish()
    loaded, said = auto.from_pretrained(folder, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    assert same(scored(engine, rows), loaded) and not same(scored(engine, rows), model)
    parts = [name for name in model.state_dict() if "vision" in name or "audio" in name]
    assert all(torch.equal(loaded.state_dict()[name], model.state_dict()[name]) for name in parts)


UNFIT: dict[str, tuple[str, Any, str]] = {
    "both ways": ("bert", BertConfig(**COMMON), "both directions"),
    "an encoder beside": (
        "t5",
        T5Config(vocab_size=61, d_model=24, num_layers=1, num_heads=2),
        "encoder and a decoder",
    ),
    "no such class": ("funnel", FunnelConfig(vocab_size=61, d_model=24), "has no language model"),
    "own code": (
        "mine",
        {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "m.M"}},
        "code of their own",
    ),
    "own code of a known family": (
        "llama",
        {
            "model_type": "llama",
            "auto_map": {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"},
        },
        "code of their own are not run by this service.* no class MineForCausalLM",
    ),
    "nothing for text alone": (
        "blip",
        BlipConfig(),
        "does not answer to text alone: it needs pixel_values",
    ),
    "unknown": ("", {"hidden_size": 3}, "no model_type"),
    "cannot be built": ("llama", LlamaConfig(**{**COMMON, "hidden_act": "none"}), "KeyError"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_folder_that_no_group_can_run_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    """By its configuration alone: before any weight is read, and for the reference by the
    reference's key."""
    family, made, reason = UNFIT[case]
    good = save_model(tmp_path / "good")
    bad = tmp_path / "bad"
    bad.mkdir()
    save_file({"weight": torch.zeros(1)}, bad / "model.safetensors")
    (bad / "config.json").write_text(json.dumps(made if isinstance(made, dict) else made.to_dict()))
    for key, own, reference in (
        ("actor.model.path", bad, None),
        ("actor.ref.model.path", good, str(bad)),
    ):
        with pytest.raises(ServiceError) as caught:
            check_models(
                "actor", {"model": {"path": str(own)}, "ref": {"model": {"path": reference}}}
            )
        error = caught.value
        assert (error.code, error.details["key"]) == ("INVALID_CONFIG", key)
        assert error.message.startswith(f"{key}: the {family}") and re.search(reason, error.message)
        assert "\n" not in error.message and len(error.message) < 1000


def test_code_beside_a_class_of_transformers_is_not_asked(tmp_path: Path) -> None:
    """Folders of the hub carry the code that they had before transformers did."""
    path = save_model(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    named = {
        "AutoConfig": "configuration_x.XConfig",
        "AutoModelForCausalLM": "modeling_qwen2.Qwen2ForCausalLM",
    }
    (tmp_path / "config.json").write_text(json.dumps({**said, "auto_map": named}))
    check_models("actor", {"model": {"path": path}, "ref": {"model": {"path": None}}})


def test_a_model_that_reads_ahead_is_refused_where_its_configuration_does_not_say_so(
    tmp_path: Path,
) -> None:
    """XLNet's attention is bidirectional by a name of its own; it is measured."""
    made = XLNetConfig(vocab_size=61, d_model=32, n_layer=2, n_head=4, d_inner=48, pad_token_id=0)
    AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path)
    with pytest.raises(InvalidValue, match="both directions"):
        build(str(tmp_path), dtype="float32")


def test_a_family_that_cannot_go_backward_is_refused_where_it_would_train(tmp_path: Path) -> None:
    """Reformer's backward wants training mode, in which it would drop out; where nothing learns it
    scores as it is."""
    made = ReformerConfig(
        vocab_size=61, hidden_size=32, attention_head_size=8, num_attention_heads=4,
        attn_layers=["local", "local"],
        feed_forward_size=32, axial_pos_embds=False, is_decoder=True, max_position_embeddings=64,
        pad_token_id=0,
        local_attn_chunk_length=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made)
    model.save_pretrained(tmp_path)
    with pytest.raises(
        InvalidValue, match="ReformerModelWithLMHead cannot be trained: AssertionError"
    ) as caught:
        build(str(tmp_path), dtype="float32")
    assert "\n" not in str(caught.value)
    ids = torch.randint(3, 57, (2, 9), generator=torch.Generator().manual_seed(1))
    rows = MemoryRows({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, temperature=0.8)
    assert torch.allclose(
        scored(build(str(tmp_path), "teacher", dtype="float32"), rows),
        own_scores(model, ids),
        atol=1e-5,
    )


def test_trying_the_backward_leaves_nothing_behind(tmp_path: Path) -> None:
    """No gradient, nothing gathered: weights and gradients of a new group are its shards."""
    for role in ("actor", "critic"):
        root = build(save_model(tmp_path / role), role)._model
        assert all(param.grad is None and isinstance(param, DTensor) for param in root.parameters())


def test_padding_side_does_not_matter(tmp_path: Path) -> None:
    """The same tokens padded left or right get the same log-probabilities."""
    engine = build(save_model(tmp_path), "teacher")
    ids = torch.randint(0, 61, (1, 6), generator=torch.Generator().manual_seed(1))
    junk = torch.full((1, 3), 999)
    one, zero = torch.ones(1, 6, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)
    left = MemoryRows(
        {"input_ids": torch.cat([junk, ids], 1), "attention_mask": torch.cat([zero, one], 1)}
    )
    right = MemoryRows(
        {"input_ids": torch.cat([ids, junk], 1), "attention_mask": torch.cat([one, zero], 1)}
    )
    scores = [scored(engine, rows) for rows in (left, right)]
    assert torch.equal(scores[0][:, 3:], scores[1][:, :5])


def test_bad_folders_and_positions(tmp_path: Path) -> None:
    """A folder without safetensors, a float8 dtype, an unknown role and a sequence beyond the
    positions are refused."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES["gpt2"][0]).save_pretrained(tmp_path / "table")
    engine = build(str(tmp_path / "table"))
    path = save_model(tmp_path / "good")
    long = MemoryRows(
        {"input_ids": torch.zeros(1, 65, dtype=torch.int64), "attention_mask": torch.ones(1, 65)}
    )
    with pytest.raises(InvalidValue, match="64"):
        scored(engine, long)
    (tmp_path / "good" / "model.safetensors").unlink()
    for call in (
        lambda: build(path),
        lambda: build(str(tmp_path / "none")),
        lambda: build(path, dtype="float8"),
        lambda: build(path, "critic"),
    ):
        with pytest.raises(InvalidValue):
            call()


def test_steps_without_old_log_probs(tmp_path: Path) -> None:
    """Without old_log_probs one optimizer step starts at ratio 1; several are refused."""
    path = save_model(tmp_path)
    rows = batch()
    del rows.tensors["old_log_probs"]
    engine = build(path)
    assert update(engine, rows)[0].metrics["actor/ratio_mean"] == 1.0
    engine = build(path, ppo_epochs=2)
    with pytest.raises(InvalidValue, match="old_log_probs"):
        update(engine, rows)


def test_kl_to_the_own_reference(tmp_path: Path) -> None:
    """A KL term without ref_log_prob is measured to the weights on disk: 0 before the first step,
    more after it."""
    rows = batch()
    del rows.tensors["ref_log_prob"]
    settings = {"use_kl_loss": True, "kl_loss_type": "k2", "entropy_coeff": 0.1}
    engine = build(save_model(tmp_path), **settings)
    apart = [update(engine, rows)[0].metrics["actor/kl_loss"] for _ in range(2)]
    assert apart[0] == 0.0
    assert apart[1] > 1e-6


def test_an_error_midway_drops_the_gradients(tmp_path: Path) -> None:
    """When reading the second micro-batch fails, nothing of the first one reaches a later step."""
    rows, broken = batch(), batch()
    cut = {"ppo_micro_batch_size_per_gpu": 3}
    engines = [build(save_model(tmp_path), **cut) for _ in range(2)]
    prepared, plan = planned(engines[0], "forward_backward", broken)
    whole = broken.tensor

    def fail(name: str, wanted: Any) -> torch.Tensor:
        if 3 in wanted and name == "input_ids":
            raise OSError("the payload is gone")
        return whole(name, wanted)

    broken.tensor = fail  # type: ignore[method-assign]
    with pytest.raises(OSError, match="gone"):
        engines[0].accumulate(prepared, plan)
    assert not engines[0].state.pending
    for engine in engines:
        update(engine, rows)
    assert engines[0].state.fingerprint() == engines[1].state.fingerprint()


def test_imports_stay_few() -> None:
    """The mathematics knows the contract, and neither Redis nor HTTP."""
    heavy = "redis", "rq", "fastapi", "nexrl_ledger", "nexrl_payloads"
    code = (
        f"import sys, nexrl_worker.training; sys.stdout.write(str([m for m in {heavy} if m in "
        "sys.modules]))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == "[]"
