"""The small files of a Hugging Face model folder: configuration, tokenizer, processors, never
weights or code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from nexrl_storage.manifest import EXPORT, MANIFEST, FileEntry, write_file

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


def copy_model_files(
    source: Path, folder: Path, changes: Mapping[str, Any], dtypes: Sequence[str] = ()
) -> list[FileEntry]:
    """Copy what ``source`` has of them into ``folder``; returns what was written. Raises OSError.

    That is every file of at most ``MOST_BYTES`` that is no weights, code or record of other
    weights, and additional chat templates. ``changes`` replace keys of ``config.json``: a critic
    has another head than the model that it was made of. A quantisation is not named there any more.
    ``dtypes``: those of the weights beside it, the main one first. Loaders go by the configuration.
    """
    names, written = sorted(_small_files(source)), []
    for count, name in enumerate(names, 1):
        content = (source / name).read_bytes()
        if name == CONFIG:
            config: dict[str, Any] = json.loads(content)
            changed = _of_these_weights(
                {**config, **changes}, tied="tie_word_embeddings" not in changes
            )
            if dtypes:
                changed = _agreeing(changed, dtypes)
                if not {"dtype", "torch_dtype"} & changed.keys():
                    changed["dtype"] = dtypes[0]
            if dtypes or changed != config:
                content = json.dumps(changed, indent=2).encode()
        more = any(Path(later).parent == Path(name).parent for later in names[count:])
        written.append(write_file(folder, name, content, more=more))
    return written


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


def _agreeing(config: dict[str, Any], dtypes: Sequence[str]) -> dict[str, Any]:
    """What it and its parts (``text_config`` and the like) say of a dtype becomes the main one
    where it is none of ``dtypes``."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            changed[key] = value if value in dtypes else dtypes[0]
        else:
            changed[key] = _agreeing(value, dtypes) if isinstance(value, dict) else value
    return changed
