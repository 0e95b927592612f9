"""The models that are measured, made from configurations alone, and what a token of them costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

# Dense bf16 FLOP/s by name of the device, from the makers' data sheets; the first name that fits
# counts.
_PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


@dataclass(frozen=True)
class Shape:
    """A model and the batch it is measured on: `rows` of `length` tokens, `micro` rows in each
    forward."""

    name: str
    config: PretrainedConfig
    length: int
    rows: int
    micro: int


def half_billion(small: bool) -> Shape:
    """Qwen2-0.5B's shape with a tied head; `small` keeps the family and little else."""
    if small:
        return Shape("tiny Qwen2", _qwen2(512, 48, 2, 4, 2, 96, 64), length=64, rows=8, micro=4)
    return Shape(
        "Qwen2-0.5B's shape",
        _qwen2(151_936, 896, 24, 14, 2, 4864, 4096),
        length=2048,
        rows=16,
        micro=4,
    )


def eight_layers(small: bool) -> Shape:
    """Eight layers of Llama-3.1-8B's shape, the head untied, at 8192 tokens a row; `small` as
    above."""
    if small:
        return Shape("tiny Llama", _llama(640, 64, 2, 4, 2, 96, 128), length=128, rows=2, micro=1)
    return Shape(
        "8 layers of Llama-3.1-8B's shape",
        _llama(128_256, 4096, 8, 32, 8, 14_336, 8192),
        length=8192,
        rows=4,
        micro=1,
    )


def parity_shape() -> Shape:
    """A Qwen2 that a CPU computes in float64 in seconds: biases, grouped heads, tied head."""
    return Shape("small Qwen2", _qwen2(2048, 128, 3, 4, 2, 320, 256), length=160, rows=6, micro=3)


def _qwen2(
    vocabulary: int, hidden: int, layers: int, heads: int, kv: int, inner: int, positions: int
) -> PretrainedConfig:
    return Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv, intermediate_size=inner, max_position_embeddings=positions,
        tie_word_embeddings=True,
    )  # fmt: skip


def _llama(
    vocabulary: int, hidden: int, layers: int, heads: int, kv: int, inner: int, positions: int
) -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv, intermediate_size=inner, max_position_embeddings=positions,
        tie_word_embeddings=False,
    )  # fmt: skip


def write_model(
    folder: Path, config: PretrainedConfig, device: torch.device, dtype: torch.dtype
) -> Path:
    """Random weights as a folder of config.json and safetensors; made on `device`, where large ones
    take no time."""
    torch.manual_seed(0)
    with device:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(value, std=0.1)
    model.save_pretrained(folder)
    return folder


def matmul_parameters(config: Any) -> int:
    """N_matmul: weights that every token is multiplied by, the head among them, the embedding's
    look-up not."""
    hidden, size = config.hidden_size, head_size(config)
    attention = 2 * hidden * size * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention + 3 * hidden * config.intermediate_size
    return int(config.num_hidden_layers * layer + hidden * config.vocab_size)


def head_size(config: Any) -> int:
    """d: the width of one attention head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def step_flops(config: Any, lengths: Sequence[int]) -> float:
    """Forward and backward over rows of these real lengths: (6 N_matmul + 12 L H d S) per token.

    S is the sum of squared lengths over the sum of lengths; neither padding nor recomputation
    counts, and the causal half of attention is not taken off (PaLM, arXiv:2204.02311, appendix B).
    """
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * head_size(config)
    return float(
        6 * matmul_parameters(config) * sum(lengths) + attention * sum(n * n for n in lengths)
    )


def peak_flops(device_name: str) -> float | None:
    """The device's dense bf16 peak; None where it is not known here."""
    return next((peak for name, peak in _PEAKS.items() if name in device_name), None)
