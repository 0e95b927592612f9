"""One rank in this process: model families, the probe of their logits, and what the package imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from nexrl_worker.checkpoint.huggingface import FolderWriter, Stamp, export
from nexrl_worker.training import Engine, InvalidValue
from single_rank import build, compute, update
from support import MemoryRows, batch, save_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

COMMON = dict(
    vocab_size=61, hidden_size=24, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.02, pad_token_id=0,
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
    """Each family scores as its own logits do, takes a step, is saved and loaded again; other logits are found out."""
    made, chunked = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made)
    model.save_pretrained(tmp_path / "first")
    cut = {"dtype": "float32", "ppo_micro_batch_size_per_gpu": 2}
    engine = build(str(tmp_path / "first"), **cut)
    info = engine.info()
    assert info["chunked_log_probs"] is chunked and (info["chunked_log_probs_reason"] is None) is chunked
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    rows = MemoryRows(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "advantages": torch.ones(2)}, temperature=0.8
    )
    assert torch.allclose(scored(engine, rows), own_scores(model, ids), atol=1e-5)
    before = engine.fingerprint()
    result = update(engine, rows)[0].metrics
    assert result["step_applied"] and result["actor/grad_norm"] > 0 and engine.fingerprint() != before

    folder = tmp_path / "second"
    folder.mkdir()
    writer = FolderWriter(folder, tmp_path / "first", Stamp("family", 1, 1, "0" * 16))
    assert export(engine.full_weights(), writer) is None
    writer.finish()
    again = build(str(folder), **cut)
    assert again.fingerprint() == engine.fingerprint()
    trained = scored(engine, rows)
    assert torch.equal(scored(again, rows), trained)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.allclose(trained, own_scores(loaded, ids), atol=1e-5)


@torch.no_grad()
def own_scores(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [B,S-1] at temperature 0.8 by the family's own logits."""
    logs = torch.log_softmax(model.eval()(ids).logits.float() / 0.8, dim=-1)
    return logs[:, :-1].gather(2, ids[:, 1:, None])[..., 0]


def test_padding_side_does_not_matter(tmp_path: Path) -> None:
    """The same tokens padded left or right get the same log-probabilities."""
    engine = build(save_model(tmp_path), "teacher")
    ids = torch.randint(0, 61, (1, 6), generator=torch.Generator().manual_seed(1))
    junk = torch.full((1, 3), 999)
    one, zero = torch.ones(1, 6, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)
    left = MemoryRows({"input_ids": torch.cat([junk, ids], 1), "attention_mask": torch.cat([zero, one], 1)})
    right = MemoryRows({"input_ids": torch.cat([ids, junk], 1), "attention_mask": torch.cat([one, zero], 1)})
    scores = [scored(engine, rows) for rows in (left, right)]
    assert torch.equal(scores[0][:, 3:], scores[1][:, :5])


def test_bad_folders_and_positions(tmp_path: Path) -> None:
    """A folder without safetensors, a float8 dtype, an unknown role and a sequence beyond the positions are refused."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES["gpt2"][0]).save_pretrained(tmp_path / "table")
    engine = build(str(tmp_path / "table"))
    path = save_model(tmp_path / "good")
    long = MemoryRows({"input_ids": torch.zeros(1, 65, dtype=torch.int64), "attention_mask": torch.ones(1, 65)})
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
    """A KL term without ref_log_prob is measured to the weights on disk: 0 before the first step, more after it."""
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
    plan = engines[0].plan("forward_backward", rows.size, None)
    whole = broken.tensor

    def fail(name: str, wanted: Any) -> torch.Tensor:
        if 3 in wanted and name == "input_ids":
            raise OSError("the payload is gone")
        return whole(name, wanted)

    broken.tensor = fail  # type: ignore[method-assign]
    with pytest.raises(OSError, match="gone"):
        engines[0].accumulate(plan, broken, {})
    assert not engines[0].pending
    for engine in engines:
        update(engine, rows)
    assert engines[0].fingerprint() == engines[1].fingerprint()


def test_imports_stay_few() -> None:
    """The mathematics runs on a machine without the service's other dependencies."""
    heavy = "pydantic", "redis", "rq", "fastapi", "nexrl_contract"
    code = f"import sys, nexrl_worker.training; sys.stdout.write(str([m for m in {heavy} if m in sys.modules]))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
