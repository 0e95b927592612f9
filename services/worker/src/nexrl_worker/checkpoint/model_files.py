"""The small files of a Hugging Face model folder: configuration and tokenizer, never weights or code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nexrl_contract.durable import write_file

CONFIG = "config.json"
_NAMES = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)


def copy_model_files(source: Path, folder: Path, changes: Mapping[str, Any]) -> list[str]:
    """Copy what ``source`` has of them into ``folder`` (made if need be), synced; returns the names. Raises OSError.

    ``changes`` replace keys of ``config.json``: a critic has another head than the model that it was made of.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in _NAMES if (source / name).is_file()]
    for name in names:
        write_file(folder / name, (source / name).read_bytes())
    if changes and CONFIG in names:
        _change_config(folder, changes)
    return names


def set_dtype(folder: Path, dtype: str) -> None:
    """Let ``config.json`` name the dtype that the weights beside it have: loaders go by the configuration."""
    old_name = {"torch_dtype": dtype} if "torch_dtype" in json.loads((folder / CONFIG).read_bytes()) else {}
    _change_config(folder, {"dtype": dtype, **old_name})


def _change_config(folder: Path, changes: Mapping[str, Any]) -> None:
    path = folder / CONFIG
    config: dict[str, Any] = json.loads(path.read_bytes())
    write_file(path, json.dumps({**config, **changes}, indent=2).encode())
