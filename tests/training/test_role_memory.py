"""What a role holds: only a group that learns has an optimizer, and its process is that much
larger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

from tests.helpers.rank_processes import run_ranks

BIG: dict[str, Any] = dict(
    vocab_size=8000, hidden_size=768, intermediate_size=2048, num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4, tie_word_embeddings=True, num_labels=1, pad_token_id=0,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("role", ["actor", "ref", "teacher", "reward"])
def test_memory(tmp_path: Path, role: str) -> None:
    """After one operation an actor holds weights and two moments; the others weights alone, and
    what the allocator keeps."""
    torch.manual_seed(0)
    kind = Qwen2ForSequenceClassification if role == "reward" else Qwen2ForCausalLM
    kind(Qwen2Config(**BIG)).save_pretrained(tmp_path / "model")
    found = run_ranks(1, "memory", tmp_path, str(tmp_path / "model"), role, program="cuts")
    share = found["grown"] / found["parameters"]
    assert found["parameters"] > 1e8
    if role == "actor":
        assert found["moments"] > 0 and share > 3.0
    else:
        assert found["moments"] == 0 and share < 2.6
