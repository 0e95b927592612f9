"""Builds a sharded, loaded model from a Hugging Face folder: no rank ever holds more than its own slices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, AutoModelForCausalLM

from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.parallelize import checkpoint_activations, shard
from nexrl_worker.training.scorer import Scorer
from nexrl_worker.training.weights import FolderReader, MemoryReader, Reader, load_parameters, persistent_buffers

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float64": torch.float64,
    "fp64": torch.float64,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class Precision:
    """Dtypes of the master weights, of the computation and of the gradient reduction."""

    model: torch.dtype
    param: torch.dtype
    reduce: torch.dtype

    @classmethod
    def of(cls, fsdp_config: Any, device: torch.device) -> Precision:
        """Defaults: float32 everywhere on CPU, bfloat16 computation on CUDA; float64 means everything float64."""
        if _dtype("fsdp_config.model_dtype", fsdp_config.model_dtype or "float32") == torch.float64:
            return cls(torch.float64, torch.float64, torch.float64)
        mixed = fsdp_config.mixed_precision
        usual = "bfloat16" if device.type == "cuda" else "float32"
        param = _dtype("mixed_precision.param_dtype", (mixed and mixed.param_dtype) or usual)
        reduce = _dtype("mixed_precision.reduce_dtype", (mixed and mixed.reduce_dtype) or "float32")
        return cls(torch.float32, param, reduce)


def _dtype(key: str, value: str) -> torch.dtype:
    name = str(value).removeprefix("torch.")
    if name not in _DTYPES:
        raise InvalidValue(f"{key} is {value!r}", expected=", ".join(_DTYPES), actual=str(value))
    return _DTYPES[name]


def build_scorer(
    path: str, precision: Precision, mesh: DeviceMesh, device: torch.device, recompute: bool, trainable: bool
) -> Scorer:
    """The model of folder `path`, sharded over `mesh` and loaded. Collective; raises InvalidValue on a bad folder."""
    if not (Path(path) / "config.json").is_file():
        raise InvalidValue(f"{path} is no Hugging Face model folder: it has no config.json")
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    _without_dropout(config)
    with _parameters_on_meta():
        hf: nn.Module = AutoModelForCausalLM.from_config(config, dtype=precision.model)  # type: ignore[no-untyped-call]
    hf.tie_weights()  # type: ignore[operator]
    hf.requires_grad_(trainable)
    hf.eval()
    if recompute:
        checkpoint_activations(hf)
    scorer = Scorer(hf)
    compute = None if precision.param == precision.model else precision.param
    shard(scorer, mesh, compute, None if precision.reduce == precision.model else precision.reduce)
    _materialise(scorer, device)
    load_parameters(hf, _reader(path, hf, config, precision.model))
    return scorer


def _without_dropout(config: Any) -> None:
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, key, 0.0)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters made inside take no memory; buffers (rotary frequencies and the like) are computed for real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _materialise(scorer: Scorer, device: torch.device) -> None:
    """Give the sharded meta parameters memory on `device`; buffers keep the values they were made with."""
    buffers = {name: buffer.detach().clone() for name, buffer in scorer.named_buffers()}
    scorer.to_empty(device=device)
    for name, buffer in scorer.named_buffers():
        buffer.copy_(buffers[name])


def _reader(path: str, hf: nn.Module, config: Any, dtype: torch.dtype) -> Reader:
    """Slices from the folder where its names are the model's; else the whole state dict that transformers makes."""
    folder = FolderReader(Path(path))
    expected = {name for name, _ in hf.named_parameters()} | {name for name, _ in persistent_buffers(hf)}
    if expected <= folder.names:
        return folder
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    whole, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise InvalidValue(f"{path} lacks {len(missing)} weights of its model, the first is {missing[0]}")
    return MemoryReader(whole.state_dict())
