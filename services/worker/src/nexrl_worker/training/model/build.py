"""The recipe of a model, from top to bottom: config, meta device, head, what trains, compiled and
recomputed layers, wrapper, shards, weights. No rank ever holds more than its own slices."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from nexrl_contract.sections import ActorConfig, FsdpConfig, ModelConfig
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.fsdp2 import shard
from nexrl_worker.training.model.policy import PolicyModel
from nexrl_worker.training.model.roles import Role
from nexrl_worker.training.model.weight_sources import (
    folder_tensors,
    has_own_head,
    untie,
    weights_of,
)
from nexrl_worker.training.model.weights import check_finite, fill
from nexrl_worker.training.model.wrapper import ModelWrapper
from nexrl_worker.training.torch_parts import missing_compiler
from nexrl_worker.training.transformers_parts import unsplittable

_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Precision:
    """Dtypes of the master weights, of the computation and of the gradient reduction."""

    model: torch.dtype = torch.float32
    param: torch.dtype = torch.float32
    reduce: torch.dtype = torch.float32

    @classmethod
    def of(cls, fsdp_config: FsdpConfig, device: torch.device) -> Precision:
        """float32 on CPU, bfloat16 computation on CUDA; float64 means everything float64."""
        if fsdp_config.model_dtype == "float64":
            return cls(torch.float64, torch.float64, torch.float64)
        mixed = fsdp_config.mixed_precision
        param = mixed.param_dtype or ("bfloat16" if device.type == "cuda" else "float32")
        return cls(torch.float32, _DTYPES[param], _DTYPES[mixed.reduce_dtype or "float32"])

    @property
    def batch(self) -> torch.dtype:
        """Of the numbers that a batch brings."""
        return torch.float64 if self.model == torch.float64 else torch.float32


def export_dtype(model: ModelConfig) -> torch.dtype | None:
    """That of `actor.model`; None exports in the dtypes of the model's own folder."""
    return None if model.export_dtype is None else _DTYPES[model.export_dtype]


@dataclass(frozen=True)
class Recipe:
    """What decides how a model is built, beside its folder.

    `recompute`: layers run again in the backward; `head_dtype`: that of a language model's head,
    None for the others' own.
    """

    role: Role
    device: torch.device
    precision: Precision = Precision()
    recompute: bool = False
    compiled: bool = False
    head_dtype: torch.dtype | None = None

    @classmethod
    def of(cls, actor: ActorConfig, role: Role, device: torch.device) -> Recipe:
        """That of a group's configuration."""
        head = None if actor.model.lm_head_dtype is None else _DTYPES[actor.model.lm_head_dtype]
        return cls(
            role,
            device,
            Precision.of(actor.fsdp_config, device),
            actor.model.enable_gradient_checkpointing,
            actor.model.use_torch_compile,
            head,
        )


def build_model(path: str, recipe: Recipe) -> ModelWrapper:
    """The model of folder `path`, sharded over all ranks of the default process group and loaded.
    Collective; raises InvalidValue on a bad folder."""
    model = _without_weights(path, recipe)
    _materialise(model, recipe.device)
    fill(model.weights(), weights_of(path, model, recipe.role))
    check_finite(model.weights())
    return model


def check_build(path: str, role: Role) -> None:
    """Build and shard the model of a folder without its weights, in a process group of one."""
    _without_weights(path, Recipe(role, torch.device("cpu")))


def _without_weights(path: str, recipe: Recipe) -> ModelWrapper:
    """The sharded model, its parameters on the meta device."""
    role, precision, device = recipe.role, recipe.precision, recipe.device
    config = model_config(path)
    role.check(config)
    role.prepare(config)
    _without_dropout(config)
    hf = _on_meta(recipe, config)
    own_head = has_own_head(hf, folder_tensors(path))
    if own_head:
        untie(config)
        hf = _on_meta(recipe, config)
    hf.requires_grad_(role.trains)
    hf.eval()
    # Compiled first: the hooks of recomputation and of FSDP stay outside.
    if recipe.compiled:
        compile_layers(hf, device)
    if recipe.recompute:
        recompute_layers(hf)
    model = role.wrapper(hf)
    model.own_head = own_head
    if recipe.head_dtype is not None and isinstance(model, PolicyModel):
        model.widen_head(recipe.head_dtype)
    model.collectives = shard(
        model,
        sharded_layers(hf),
        init_device_mesh(device.type, (dist.get_world_size(),)),
        None if precision.param == precision.model else precision.param,
        None if precision.reduce == precision.model else precision.reduce,
    )
    return model


# -- the folder's configuration


def model_config(path: str) -> PretrainedConfig:
    """transformers' configuration of a folder; raises InvalidValue where transformers has none."""
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
    if family in CONFIG_MAPPING:
        lacks = _lacks_class(said.get("auto_map"))
    else:
        lacks = f"none of model_type {family!r}"
    if lacks is not None:
        raise InvalidValue(
            "models with code of their own are not run by this service, and transformers "
            f"{transformers.__version__} has {lacks}; give the folder of a model that it has"
        )
    config: PretrainedConfig = AutoConfig.from_pretrained(
        path, local_files_only=True, trust_remote_code=False
    )
    return config


def _lacks_class(auto_map: object) -> str | None:
    """The class of a folder's own code that transformers lacks: the family is a pretext then."""
    known = {name.casefold() for name in transformers.__all__}  # type: ignore[attr-defined] # dir() takes 0.14 s
    for auto, place in auto_map.items() if isinstance(auto_map, dict) else ():
        name = str(place).rpartition(".")[2]
        if str(auto).startswith("AutoModel") and name.casefold() not in known:
            return f"no class {name}"
    return None


def _without_dropout(config: PretrainedConfig) -> None:
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, key, 0.0)


# -- on the meta device, and off it


def _on_meta(recipe: Recipe, config: PretrainedConfig) -> nn.Module:
    with _parameters_on_meta():
        hf = recipe.role.make(config, dtype=recipe.precision.model)
    hf.tie_weights()  # type: ignore[operator]
    return hf


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters made inside take no memory; buffers (rotary frequencies) are computed."""
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
    """Give the meta parameters memory on `device`; buffers keep the values they were made with."""
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


# -- layers


def decoder_layers(hf: nn.Module) -> list[nn.Module]:
    """A forward's blocks, in order: what the family calls unsplittable, else the first list."""
    names = unsplittable(hf)
    lists = [module for module in hf.modules() if isinstance(module, nn.ModuleList)]
    layers = {module: None for found in lists for module in found if type(module).__name__ in names}
    if not layers:
        return list(lists[0]) if lists else []
    inner = {part for layer in layers for part in layer.modules() if part is not layer}
    return [layer for layer in layers if layer not in inner]


def sharded_layers(hf: nn.Module) -> list[nn.Module]:
    """The decoder layers that FSDP gathers one by one: those that share no weight with another part
    (Zamba's blocks do)."""
    layers = decoder_layers(hf)
    inner = {part for layer in layers for part in layer.modules()}
    holders = Counter(param for layer in layers for param in set(layer.parameters()))
    beside = (part for part in hf.modules() if part not in inner)
    holders.update(param for part in beside for param in part.parameters(recurse=False))
    return [layer for layer in layers if all(holders[param] == 1 for param in layer.parameters())]


def recompute_layers(hf: nn.Module) -> None:
    """Recompute each decoder layer in the backward; no parameter changes its name."""
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    for layer in decoder_layers(hf):
        layer.forward = partial(checkpoint, layer.forward, **settings)


def compile_layers(hf: nn.Module, device: torch.device) -> None:
    """Compile every decoder layer's forward; replaces it, so no parameter changes its name. Raises
    InvalidValue where no compiler is found."""
    missing = missing_compiler(device)
    if missing is not None:
        raise InvalidValue(
            f"actor.model.use_torch_compile needs {missing}", expected="false", actual="true"
        )
    for layer in decoder_layers(hf):
        layer.forward = torch.compile(layer.forward, dynamic=True)
