"""The small files of a Hugging Face model folder: configuration, tokenizer, processors, never
weights or code."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from nexrl_storage.files import write_file
from nexrl_storage.manifest import EXPORT, MANIFEST

CONFIG = "config.json"
MOST_BYTES = 128 * 1024 * 1024  # a tokenizer of a large vocabulary has some 40 MB
_CHAT_TEMPLATES = "additional_chat_templates"
_LEFT_OUT = (
    # weights, in every format, and what says where they lie
    *(
        "*.safetensors",
        "*.bin",
        "*.pt",
        "*.pth",
        "*.ckpt",
        "*.h5",
        "*.msgpack",
        "*.gguf",
        "*.ggml",
        "*.onnx*",
        "*.ot",
    ),
    *(
        "*.npz",
        "*.npy",
        "*.pkl",
        "*.pickle",
        "*.tflite",
        "*.index.json",
        "*.index",
        "*.data-*",
        "*.gz",
        "*.zip",
    ),
    *("*.py", "*.pyc", "*.so", "*.sh", "*.ipynb"),  # code
    *(EXPORT, MANIFEST, "*.tmp", "*.lock", "*.log"),  # a folder's own record is made anew
    # what is said of other weights than those written: a model card, another trainer's state,
    # adapters, a quantisation
    *("README*", "trainer_state.json", "*_results.json", "adapter_*", "*quant*_config.json"),
)


def copy_model_files(source: Path, folder: Path, changes: Mapping[str, Any]) -> list[str]:
    """Copy what ``source`` has of them into ``folder`` (made if need be), synced; returns the
    names. Raises OSError.

    That is every file of at most ``MOST_BYTES`` that is no weights, code or record of other
    weights, and additional chat templates. ``changes`` replace keys of ``config.json``: a critic
    has another head than the model that it was made of. A quantisation is not named there any more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(_small_files(source))
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        write_file(folder / name, (source / name).read_bytes())
    if CONFIG in names:
        config = _read_config(folder)
        changed = _of_these_weights(
            {**config, **changes}, tied="tie_word_embeddings" not in changes
        )
        if changed != config:
            _write_config(folder, changed)
    return names


def _of_these_weights(config: dict[str, Any], tied: bool) -> dict[str, Any]:
    """Without a quantisation, and untied in every part where the whole is."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key == "tie_word_embeddings":
            found[key] = value and tied
        elif key not in ("quantization_config", "compression_config"):
            found[key] = _of_these_weights(value, tied) if isinstance(value, dict) else value
    return found


def _small_files(source: Path) -> Iterator[str]:
    for path in source.iterdir() if source.is_dir() else ():
        if _travels(path):
            yield path.name
    for path in (source / _CHAT_TEMPLATES).glob("*.jinja"):
        if _travels(path):
            yield f"{_CHAT_TEMPLATES}/{path.name}"


def _travels(path: Path) -> bool:
    name = path.name.lower()
    if name.startswith(".") or any(fnmatch(name, pattern.lower()) for pattern in _LEFT_OUT):
        return False
    return path.is_file() and path.stat().st_size <= MOST_BYTES


def set_dtype(folder: Path, main: str, written: Collection[str]) -> None:
    """Let ``config.json`` name a dtype that weights beside it have: loaders go by the
    configuration.

    What it and its parts (``text_config`` and the like) say becomes ``main`` where it is none of
    ``written``.
    """
    config = _agreeing(_read_config(folder), main, written)
    _write_config(
        folder, config if {"dtype", "torch_dtype"} & config.keys() else {**config, "dtype": main}
    )


def _agreeing(config: dict[str, Any], main: str, written: Collection[str]) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            changed[key] = value if value in written else main
        else:
            changed[key] = _agreeing(value, main, written) if isinstance(value, dict) else value
    return changed


def _read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG).read_bytes())
    return config


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    write_file(folder / CONFIG, json.dumps(config, indent=2).encode())
