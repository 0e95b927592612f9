"""What a group of each role holds: which transformers class, which model around it, and whether it
learns."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
)

from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.model.policy import PolicyModel
from nexrl_worker.training.model.value_head import AutoModelForValues, RewardModel, ValueModel
from nexrl_worker.training.model.wrapper import ModelWrapper

_NO_LANGUAGE_MODEL = f"transformers {transformers.__version__} has no language model of that family"


class AutoModelForText:
    """A language model of any family; one that also reads images or sound, whole, since it answers
    to text alone as well."""

    @staticmethod
    def from_config(config: Any, **more: Any) -> nn.Module:
        """The model of that configuration, as transformers' own classes make it; raises
        InvalidValue."""
        family = _text_class(config)
        if family is None:
            raise InvalidValue(_NO_LANGUAGE_MODEL)
        model: nn.Module = family._from_config(config, **more)
        return model


def _text_class(config: Any) -> Any:
    """None where transformers has no class."""
    causal: Any = AutoModelForCausalLM._model_mapping
    reading: Any = AutoModelForMultimodalLM._model_mapping
    # Not the family's class for the language model inside: its export would lack what the folder's
    # config.json names.
    inner = config.get_text_config() is not config
    for known in (reading, causal) if inner else (causal, reading):
        if type(config) in known:
            return known[type(config)]
    return None


def _needed_beside_text(family: Any) -> str:
    """Names of what the family's forward cannot do without, apart from `input_ids`."""
    known = list(inspect.signature(family.forward).parameters.values())[1:]
    free = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = [part.name for part in known if part.default is part.empty and part.kind not in free]
    return ", ".join(name for name in needed if name != "input_ids")


@dataclass(frozen=True)
class Role:
    """One row of `ROLES`. `fresh_head`: a folder without the head's weights starts with zeros, so
    that a critic's first values are 0."""

    name: str
    auto: Any
    wrapper: type[ModelWrapper]
    trains: bool
    fresh_head: bool = False
    instead: str = "give the folder of a causal language model"

    def prepare(self, config: Any) -> None:
        """Settle what the folder's configuration leaves open, or says of another head."""
        if self.fresh_head:
            config.num_labels = 1

    def check(self, config: Any) -> None:
        """Raise InvalidValue where a configuration says that its model is none for the role."""
        reason = self._unfit(config)
        if reason is not None:
            raise InvalidValue(f"{reason}; {self.instead}")

    def _unfit(self, config: Any) -> str | None:
        known = getattr(self.auto, "_model_mapping", None)
        if (
            config.is_encoder_decoder and self.wrapper is not RewardModel
        ):  # whose answers are measured
            return "it has an encoder and a decoder, and rows here are one text"
        if known is not None and type(config) not in known:
            return (
                f"transformers {transformers.__version__} has no {self.auto.__name__[9:]} class "
                "for it"
            )
        if self.auto is AutoModelForText:
            family = _text_class(config)
            if family is None:
                return _NO_LANGUAGE_MODEL
            if needed := _needed_beside_text(family):
                return f"it does not answer to text alone: it needs {needed}"
        masked: Any = (
            AutoModelForMaskedLM._model_mapping
        )  # gpt_neox has the key, and is causal all the same
        encodes = any(getattr(config, name, None) is False for name in ("is_decoder", "causal"))
        if self.wrapper is PolicyModel and encodes and type(config) in masked:
            return (
                "it reads a row in both directions, so what it says of a token would know the token"
            )
        return None


ROLES = {
    role.name: role
    for role in (
        Role("actor", AutoModelForText, PolicyModel, trains=True),
        Role("ref", AutoModelForText, PolicyModel, trains=False),
        Role("teacher", AutoModelForText, PolicyModel, trains=False),
        Role("critic", AutoModelForValues, ValueModel, trains=True, fresh_head=True),
        Role(
            "reward",
            AutoModelForSequenceClassification,
            RewardModel,
            trains=False,
            instead="give the folder of a sequence classification model with one label",
        ),
    )
}


def role_of(name: str) -> Role:
    """The role of that name; raises InvalidValue with the known ones."""
    if name not in ROLES:
        raise InvalidValue(f"unknown role {name!r}", expected=", ".join(ROLES), actual=name)
    return ROLES[name]
