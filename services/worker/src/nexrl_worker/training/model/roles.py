"""What a group of each role holds: which transformers class and wrapper, and whether it learns."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
)

from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.model.policy import PolicyModel
from nexrl_worker.training.model.value_head import RewardModel, ValueModel
from nexrl_worker.training.model.wrapper import ModelWrapper
from nexrl_worker.training.transformers_parts import class_of, from_class, untied

_NO_LANGUAGE_MODEL = f"transformers {transformers.__version__} has no language model of that family"
_NO_REWARDS = (
    f"transformers {transformers.__version__} has no ForSequenceClassification class for it"
)


@dataclass(frozen=True)
class Role:
    """One row of `ROLES`. `make` builds the transformers model of a configuration and raises
    InvalidValue where there is no class; `unfit` says why a configuration's model is none for the
    role.

    `fresh_head`: a folder without the head's weights starts with zeros, so that a critic's first
    values are 0.
    """

    name: str
    make: Callable[..., nn.Module]
    wrapper: type[ModelWrapper]
    trains: bool
    unfit: Callable[[PretrainedConfig], str | None]
    fresh_head: bool = False
    instead: str = "give the folder of a causal language model"

    def prepare(self, config: PretrainedConfig) -> None:
        """Settle what the folder's configuration leaves open, or says of another head."""
        if self.fresh_head:
            config.num_labels = 1

    def check(self, config: PretrainedConfig) -> None:
        """Raise InvalidValue where a configuration says that its model is none for the role."""
        reason = self.unfit(config)
        if reason is not None:
            raise InvalidValue(f"{reason}; {self.instead}")


# -- language models


def _language_class(config: PretrainedConfig) -> type[nn.Module] | None:
    """The family's class for text; of one that also reads images or sound the whole class, since it
    answers to text alone as well. None where transformers has none."""
    # Not the class of the language model inside: its export would lack what the folder's
    # config.json names.
    causal = class_of(AutoModelForCausalLM, config)
    reading = class_of(AutoModelForMultimodalLM, config)
    whole = config.get_text_config() is config
    return (causal or reading) if whole else (reading or causal)


def _language_model(config: PretrainedConfig, **more: Any) -> nn.Module:
    family = _language_class(config)
    if family is None:
        raise InvalidValue(_NO_LANGUAGE_MODEL)
    return from_class(family, config, **more)


def _needed_beside_text(family: type[nn.Module]) -> str:
    """Names of what the family's forward cannot do without, apart from `input_ids`."""
    known = list(inspect.signature(family.forward).parameters.values())[1:]
    free = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = [part.name for part in known if part.default is part.empty and part.kind not in free]
    return ", ".join(name for name in needed if name != "input_ids")


def _unfit_for_text(config: PretrainedConfig) -> str | None:
    if config.is_encoder_decoder:
        return "it has an encoder and a decoder, and rows here are one text"
    family = _language_class(config)
    if family is None:
        return _NO_LANGUAGE_MODEL
    if needed := _needed_beside_text(family):
        return f"it does not answer to text alone: it needs {needed}"
    encodes = any(getattr(config, name, None) is False for name in ("is_decoder", "causal"))
    # gpt_neox has the key, and is causal all the same
    if encodes and class_of(AutoModelForMaskedLM, config) is not None:
        return "it reads a row in both directions, so what it says of a token would know the token"
    return None


# -- critics


def _critic(config: PretrainedConfig, **more: Any) -> nn.Module:
    """transformers' token classification, where that is a linear layer on the backbone, else the
    family's language model with `score`, of one output, in the output head's place."""
    own = class_of(AutoModelForTokenClassification, config)
    if own is not None:
        with torch.device("meta"):
            model: Any = own(config)
        children = [child for child in model.children() if child is not model.base_model]
        beside = [child for child in children if list(child.parameters())]
        if len(beside) == 1 and isinstance(beside[0], nn.Linear):
            return from_class(own, config, **more)
    causal = class_of(AutoModelForCausalLM, config)
    if causal is None:
        raise InvalidValue(
            f"no critic can be made of a {config.model_type}: it is no causal language model"
        )
    return from_class(_with_value_head(causal), config, **more)


def _with_value_head(causal: Any) -> Any:
    def build(self: Any, config: PretrainedConfig) -> None:
        causal.__init__(self, config)
        head = causal.get_output_embeddings(self)
        names = [name for name, child in self.named_children() if child is head]
        if not names:
            raise InvalidValue(
                f"no critic can be made of a {causal.__name__}: its output head is no part of its "
                "own"
            )
        delattr(self, names[0])
        self.score = nn.Linear(head.weight.shape[1], 1)
        self.post_init()

    name = causal.__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    return untied(f"{name}ForTokenClassification", causal, build)


def _unfit_for_values(config: PretrainedConfig) -> str | None:
    if config.is_encoder_decoder:
        return "it has an encoder and a decoder, and rows here are one text"
    return None


# -- reward models


def _reward_model(config: PretrainedConfig, **more: Any) -> nn.Module:
    auto: Any = AutoModelForSequenceClassification
    model: nn.Module = auto.from_config(config, **more)
    return model


def _unfit_for_rewards(config: PretrainedConfig) -> str | None:
    """Encoders and decoders are none: what a reward model answers is measured."""
    return None if class_of(AutoModelForSequenceClassification, config) else _NO_REWARDS


ROLES = {
    role.name: role
    for role in (
        Role("actor", _language_model, PolicyModel, True, _unfit_for_text),
        Role("ref", _language_model, PolicyModel, False, _unfit_for_text),
        Role("teacher", _language_model, PolicyModel, False, _unfit_for_text),
        Role("critic", _critic, ValueModel, True, _unfit_for_values, fresh_head=True),
        Role(
            "reward",
            _reward_model,
            RewardModel,
            False,
            _unfit_for_rewards,
            instead="give the folder of a sequence classification model with one label",
        ),
    )
}


def role_of(name: str) -> Role:
    """The role of that name; raises InvalidValue with the known ones."""
    if name not in ROLES:
        raise InvalidValue(f"unknown role {name!r}", expected=", ".join(ROLES), actual=name)
    return ROLES[name]
