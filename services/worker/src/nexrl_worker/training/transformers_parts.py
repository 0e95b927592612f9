"""What this service uses of transformers beyond its documented interface: here and nowhere else.

tests/training/test_transformers_contract.py says what each part promises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from nexrl_worker.training.errors import InvalidValue

__all__ = [
    "PrefixChange",
    "WeightConverter",
    "WeightRenaming",
    "attention_of",
    "class_of",
    "conversions_of",
    "convert_moe_packed_tensors",
    "dot_natural_key",
    "flex_attention",
    "from_class",
    "get_model_conversion_mapping",
    "ignored_if_missing",
    "ignored_if_unexpected",
    "register_attention",
    "rename_source_key",
    "revert_weight_conversion",
    "set_conversions",
    "text_config",
    "tied_keys",
    "tied_keys_of",
    "unsplittable",
    "untied",
    "use_attention",
]


# -- classes and configurations


def class_of(auto: Any, config: PretrainedConfig) -> type[nn.Module] | None:
    """The class that an Auto class takes for a configuration; None where it has none."""
    found: type[nn.Module] | None = auto._model_mapping.get(type(config), None)
    return found


def from_class(family: Any, config: PretrainedConfig, **more: Any) -> nn.Module:
    """A fresh model of a class; `dtype` among `more` is that of its parameters."""
    model: nn.Module = family._from_config(config, **more)
    return model


def text_config(hf: nn.Module) -> PretrainedConfig:
    """The configuration of the language model, which may be one part of the model."""
    config: PretrainedConfig = hf.config.get_text_config()  # type: ignore[union-attr, operator]
    return config


def unsplittable(hf: nn.Module) -> set[str]:
    """Names of the classes whose modules a family keeps on one device: its blocks."""
    return set(getattr(hf, "_no_split_modules", None) or ())


# -- attention


def register_attention(name: str, function: Callable[..., tuple[Tensor, None]]) -> None:
    """Let models switch to an attention function of that name."""
    AttentionInterface.register(name, function)


def attention_of(hf: nn.Module) -> str:
    """The attention implementation of the language model; other parts may know but one."""
    return str(text_config(hf)._attn_implementation)


def use_attention(hf: nn.Module, name: str) -> None:
    """Switch the model's attention to the implementation `name`, unless it is there already; raises
    InvalidValue where the family cannot switch."""
    before = attention_of(hf)
    if before == name:
        return
    hf.set_attn_implementation(name)  # type: ignore[operator]
    if attention_of(hf) != name:
        hf.set_attn_implementation(before)  # type: ignore[operator]  # parts may have switched
        raise InvalidValue("the family's attention cannot be exchanged")


def flex_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **settings: Any
) -> Tensor:
    """FlexAttention as transformers calls it, compiled: query, key, value [1,A,T,D] and a block
    mask; [1,T,A,D]. Imported late, as it is slow to import."""
    from transformers.integrations.flex_attention import flex_attention_forward

    result: Tensor = flex_attention_forward(module, query, key, value, **settings)[0]
    return result


# -- weights


def ignored_if_missing(hf: nn.Module) -> list[str]:
    """Patterns of tensors that a folder may lack."""
    return list(getattr(hf, "_keys_to_ignore_on_load_missing", None) or ())


def ignored_if_unexpected(hf: nn.Module) -> list[str]:
    """Patterns of tensors in a folder that the family rightly does not take."""
    return list(getattr(hf, "_keys_to_ignore_on_load_unexpected", None) or ())


def tied_keys(hf: nn.Module) -> dict[str, str]:
    """Names of tied tensors and of those that they are tied to, submodels included."""
    keys: dict[str, str] = hf.get_expanded_tied_weights_keys(all_submodels=True)  # type: ignore[operator]
    return keys


def tied_keys_of(family: type[nn.Module] | None) -> Mapping[str, str]:
    """The same of a class, as patterns; nothing of None."""
    return getattr(family, "_tied_weights_keys", None) or {}


def untied(name: str, family: Any, build: Callable[..., None]) -> Any:
    """A class beside `family`, made by `build`, without an output head to tie.

    It is of the family's module: of another one, transformers would take it for custom code and
    convert no names.
    """
    body = {
        "__init__": build,
        "__module__": family.__module__,
        "_tied_weights_keys": None,
        "get_output_embeddings": lambda self: None,
    }
    return type(name, (family,), body)


def conversions_of(hf: nn.Module) -> list[Any]:
    """What `revert_weight_conversion` undoes for this model."""
    return list(getattr(hf, "_weight_conversions", None) or ())


def set_conversions(hf: nn.Module, conversions: list[Any]) -> None:
    """Say what `revert_weight_conversion` is to undo for this model."""
    hf._weight_conversions = conversions  # type: ignore[assignment]
