"""Writes one safetensors file in a single pass: tensors go to the storage one by one, hashed on the
way."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from nexrl_storage import at
from nexrl_storage.manifest import FileEntry
from nexrl_storage.protocol import full_disk
from torch import Tensor

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> FileEntry:
    """Write ``path``; the entry's name is the file's own. Tensors come to the CPU one at a time.

    The file that lists it is written into the same folder later. Raises ``NO_SPACE`` on a full
    disk.
    """
    with full_disk(path):
        written = at(path).write(path, _pieces(tensors, metadata), more=True)
    return FileEntry(name=path.name, **written._asdict())


def _pieces(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """The file's header, then each tensor's bytes; the widest come first, so that all are
    aligned."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        table[name] = {
            "dtype": _CODES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data if flat.numel() else b""


def set_metadata(path: Path, key: str, value: str) -> None:
    """Give a metadata key of a written file another value of the same length, in place and synced;
    its hash changes."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"][key] = value
        text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
        if len(text) != length:
            raise ValueError(f"{value!r} does not fit into {path}")
        file.seek(8)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
