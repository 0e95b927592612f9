"""Writes one safetensors file in a single pass: tensors go to the disk one by one, hashed on the
way."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from nexrl_contract.errors import ServiceError
from nexrl_storage.manifest import FileEntry
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
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> FileEntry:
    """Write and sync ``path``; the entry's name is the file's own. Tensors come to the CPU one at a
    time.

    Raises ``NO_SPACE`` on a full disk; what was written stays for the caller to remove.
    """
    order = sorted(
        tensors, key=lambda name: (-tensors[name].element_size(), name)
    )  # keeps every tensor aligned
    header = _header([(name, tensors[name]) for name in order], metadata)
    digest = hashlib.sha256(header)
    size = len(header)
    try:
        with open(path, "wb") as file:
            file.write(header)
            for name in order:
                view = _bytes_of(tensors[name])
                digest.update(view)
                file.write(view)
                size += view.nbytes
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise no_space(error, path) from error
    return FileEntry(name=path.name, size=size, sha256=digest.hexdigest())


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


def no_space(error: OSError, path: Path) -> Exception:
    """``NO_SPACE`` for a full disk or quota, else the error itself."""
    if error.errno in _NO_SPACE:
        return ServiceError(
            "NO_SPACE", f"no space is left to write {path}; free some and save again"
        )
    return error


def _header(tensors: list[tuple[str, Tensor]], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors:
        start, end = end, end + tensor.numel() * tensor.element_size()
        table[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
