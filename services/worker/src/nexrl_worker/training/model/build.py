"""Builds a sharded, loaded model from a Hugging Face folder: no rank ever holds more than its own
slices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from nexrl_contract.sections import ActorConfig, FsdpConfig, ModelConfig
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import CONFIG_MAPPING, AutoConfig

from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.fsdp2 import checkpoint_activations, compile_layers, shard
from nexrl_worker.training.model.policy import PolicyModel
from nexrl_worker.training.model.roles import Role
from nexrl_worker.training.model.weight_sources import (
    folder_tensors,
    has_own_head,
    untie,
    weights_of,
)
from nexrl_worker.training.model.weights import check_finite, load_parameters
from nexrl_worker.training.model.wrapper import ModelWrapper

_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Precision:
    """Dtypes of the master weights, of the computation and of the gradient reduction."""

    model: torch.dtype
    param: torch.dtype
    reduce: torch.dtype

    @classmethod
    def of(cls, fsdp_config: FsdpConfig, device: torch.device) -> Precision:
        """Defaults: float32 everywhere on CPU, bfloat16 computation on CUDA; float64 means
        everything float64."""
        if fsdp_config.model_dtype == "float64":
            return cls(torch.float64, torch.float64, torch.float64)
        mixed = fsdp_config.mixed_precision
        usual = "bfloat16" if device.type == "cuda" else "float32"
        return cls(
            torch.float32,
            _DTYPES[mixed.param_dtype or usual],
            _DTYPES[mixed.reduce_dtype or "float32"],
        )


def export_dtype(model: ModelConfig) -> torch.dtype | None:
    """That of `actor.model`; None exports in the dtypes of the folder that the model was made
    of."""
    return None if model.export_dtype is None else _DTYPES[model.export_dtype]


@dataclass(frozen=True)
class Options:
    """How layers and head are computed: layers again in the backward, compiled, the head's product
    in another dtype."""

    recompute: bool = False
    compiled: bool = False
    head_dtype: torch.dtype | None = None

    @classmethod
    def of(cls, model: ModelConfig) -> Options:
        """From `actor.model`."""
        head = None if model.lm_head_dtype is None else _DTYPES[model.lm_head_dtype]
        return cls(model.enable_gradient_checkpointing, model.use_torch_compile, head)


def load_model(
    actor: ActorConfig, path: str, device: torch.device, role: Role, trainable: bool
) -> ModelWrapper:
    """The model of folder `path` over all ranks, computed as `actor` says; raises InvalidValue on a
    bad folder."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    precision = Precision.of(actor.fsdp_config, device)
    return build_model(path, role, precision, mesh, device, Options.of(actor.model), trainable)


def build_model(
    path: str,
    role: Role,
    precision: Precision,
    mesh: DeviceMesh,
    device: torch.device,
    options: Options,
    trainable: bool,
) -> ModelWrapper:
    """The model of folder `path`, sharded over `mesh` and loaded. Collective; raises InvalidValue
    on a bad folder.

    `lm_head_dtype` concerns language models alone.
    """
    model = _assemble(path, role, precision, mesh, device, options, trainable)
    _materialise(model, device)
    load_parameters(model.hf, weights_of(path, model.hf, role))
    check_finite(model.hf)
    return model


def check_build(path: str, role: Role) -> None:
    """Build and shard the model of folder `path` without reading a weight, in a process group of
    one; raises what that does."""
    mesh = init_device_mesh("cpu", (1,))
    whole = Precision(torch.float32, torch.float32, torch.float32)
    _assemble(path, role, whole, mesh, torch.device("cpu"), Options(), role.trains)


def model_config(path: str) -> Any:
    """transformers' configuration of folder `path`; raises InvalidValue where its model is none of
    transformers'."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise InvalidValue(f"{path} is no Hugging Face model folder: it has no config.json")
    try:
        said = json.loads(file.read_bytes())
    except ValueError as error:
        raise InvalidValue(f"{file} is not JSON: {error}") from error
    family = said.get("model_type") if isinstance(said, dict) else None
    if not isinstance(family, str):
        raise InvalidValue(f"{file} names no model_type")
    lacks = (
        f"none of model_type {family!r}"
        if family not in CONFIG_MAPPING
        else _lacks_class(said.get("auto_map"))
    )
    if lacks is not None:
        raise InvalidValue(
            "models with code of their own are not run by this service, and transformers "
            f"{transformers.__version__} has {lacks}; give the folder of a model that it has"
        )
    return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _lacks_class(auto_map: Any) -> str | None:
    """The class that a folder's own code defines where transformers has none of that name: its
    family is a pretext."""
    known = {name.casefold() for name in transformers.__all__}  # type: ignore[attr-defined] # dir() takes 0.14 s
    for auto, place in auto_map.items() if isinstance(auto_map, dict) else ():
        name = str(place).rpartition(".")[2]
        if str(auto).startswith("AutoModel") and name.casefold() not in known:
            return f"no class {name}"
    return None


def _assemble(
    path: str,
    role: Role,
    precision: Precision,
    mesh: DeviceMesh,
    device: torch.device,
    options: Options,
    trainable: bool,
) -> ModelWrapper:
    """The sharded model, its parameters on the meta device."""
    config = model_config(path)
    role.check(config)
    role.prepare(config)
    _without_dropout(config)
    hf = _on_meta(role, config, precision)
    own_head = has_own_head(hf, folder_tensors(path))
    if own_head:
        untie(config)
        hf = _on_meta(role, config, precision)
    hf.requires_grad_(trainable)
    hf.eval()
    if options.compiled:
        compile_layers(hf, device)
    if options.recompute:
        checkpoint_activations(hf)
    model = role.wrapper(hf)
    if options.head_dtype is not None and isinstance(model, PolicyModel):
        model.widen_head(options.head_dtype)
    compute = None if precision.param == precision.model else precision.param
    shard(model, mesh, compute, None if precision.reduce == precision.model else precision.reduce)
    model.own_head = own_head
    return model


def _on_meta(role: Role, config: Any, precision: Precision) -> nn.Module:
    with _parameters_on_meta():
        hf: nn.Module = role.auto.from_config(config, dtype=precision.model)
    hf.tie_weights()  # type: ignore[operator]
    return hf


def _without_dropout(config: Any) -> None:
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, key, 0.0)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters made inside take no memory; buffers (rotary frequencies and the like) are computed
    for real."""
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


def _materialise(model: ModelWrapper, device: torch.device) -> None:
    """Give the sharded meta parameters memory on `device`; buffers keep the values they were made
    with."""
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
