"""Where the weights of a model folder come from: its files by slices, or what transformers makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nexrl_worker.training.conversion import ConvertingReader
from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.heads import head_of
from nexrl_worker.training.kinds import Kind
from nexrl_worker.training.weights import FolderReader, MemoryReader, Reader, persistent_buffers


def weights_of(path: str, hf: nn.Module, config: Any, kind: Kind, dtype: torch.dtype) -> Reader:
    """Slices of the folder, converted as transformers does; else the whole state dict that it makes.

    Raises InvalidValue where weights are missing that the model needs.
    """
    folder = FolderReader(Path(path))
    needed = {name for name, _ in hf.named_parameters()} | {name for name, _ in persistent_buffers(hf)}
    fresh = _head_names(hf) if kind.fresh_head else set()
    try:
        reader = ConvertingReader(hf, folder)
    except RuntimeError as error:  # shapes that do not go together
        raise InvalidValue(f"the weights in {path} are not those of its configuration: {error}") from error
    shapes = reader.shapes
    if needed - fresh <= shapes.keys():
        for name, param in hf.named_parameters():
            if name in shapes and shapes[name] != tuple(param.shape):
                found, expected = str(list(shapes[name])), str(list(param.shape))
                message = f"{name} in {path} has shape {found}, the model needs {expected}"
                raise InvalidValue(message, tensor=name, expected=expected, actual=found)
        return _WithZeros(reader, hf, fresh - shapes.keys())
    loaded: Any = kind.auto.from_pretrained(
        path, config=config, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    whole, report = loaded
    missing = sorted(set(report["missing_keys"]) - fresh)
    if missing:
        raise InvalidValue(f"{path} lacks {len(missing)} weights of its model, the first is {missing[0]}")
    return _WithZeros(MemoryReader(whole.state_dict()), hf, fresh & set(report["missing_keys"]))


def _head_names(hf: nn.Module) -> set[str]:
    head = head_of(hf)
    own = {id(param) for param in head.parameters()}
    return {name for name, param in hf.named_parameters() if id(param) in own}


class _WithZeros:
    """A reader in which some parameters are zero."""

    def __init__(self, reader: Reader, hf: nn.Module, zeros: set[str]) -> None:
        self._reader = reader
        self._shapes = {name: tuple(param.shape) for name, param in hf.named_parameters() if name in zeros}

    def read(self, name: str, offset: int, length: int) -> Tensor:
        if name in self._shapes:
            return torch.zeros(length, *self._shapes[name][1:])
        return self._reader.read(name, offset, length)
