"""A critic and a reward model: a head with one output on the same backbones that language models
have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from nexrl_worker.training.batch.micro_batch import MicroBatch
from nexrl_worker.training.batch.validate import Limits
from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.model.wrapper import ModelWrapper, taken


class ValueModel(ModelWrapper):
    """The critic: a linear layer on the last hidden states, whatever else its family's own class
    does."""

    def __init__(self, hf: nn.Module) -> None:
        super().__init__(hf)
        head_of(hf)

    def values(self, micro: MicroBatch) -> Tensor:
        """[n,R]: the head at the column before each label (S-R-1+k), where the action k is chosen;
        0 if not attended."""
        values: Tensor = self(lambda: _scalars(self, micro, micro.index))
        return micro.scatter(values)


class RewardModel(ModelWrapper):
    """The reward model. `fallback` says why its family's own forward is used instead of its linear
    head."""

    def __init__(self, hf: nn.Module) -> None:
        super().__init__(hf)
        labels = int(hf.config.num_labels)  # type: ignore[union-attr, arg-type]
        if labels != 1:
            name = type(hf).__name__
            message = f"{name} has {labels} outputs, a reward model has one"
            raise InvalidValue(message, expected="num_labels 1", actual=str(labels))
        heads = _linear_children(hf)
        self.fallback: str | None = None if len(heads) == 1 else "the head is not one linear layer"

    def rewards(self, micro: MicroBatch) -> Tensor:
        """[n]: every row's answer; 0 for a row without any token."""

        return torch.where(micro.last >= 0, self(lambda: self.answers(micro)), 0.0)

    def answers(self, micro: MicroBatch) -> Tensor:
        """[n]: by the linear head or by the family's own forward; only inside `forward`."""
        if self.fallback is not None:
            return self.own(micro.input_ids, micro.attention_mask)
        return _scalars(self, micro, self._places(micro))

    def own_limits(self, limits: Limits) -> Limits:
        """`limits`, where the family's own forward counts positions: some begin in their table
        after the padding id."""
        if self.fallback is None:
            return limits
        tables = [part for part in self.hf.modules() if isinstance(part, nn.Embedding)]
        kept = [part.padding_idx for part in tables if part.num_embeddings == limits.positions]
        taken = max((number + 1 for number in kept if number is not None), default=0)
        most = None if limits.positions is None else limits.positions - taken
        return replace(limits, positions=most, counts=True)

    def own(self, ids: Tensor, attention: Tensor | None) -> Tensor:
        """[n]: what the model itself answers to rows [n,C], padded behind; only inside
        `forward`."""
        padding = padding_id(self.hf)
        if padding is not None and attention is not None:
            ids = torch.where(attention.bool(), ids, padding)
        self.rows.are(attention, None)
        more = taken(self.hf, use_cache=False)
        logits: Tensor = self.hf(input_ids=ids, attention_mask=attention, **more).logits
        return _wide(logits.sum(dim=-1))

    def _places(self, micro: MicroBatch) -> Tensor:
        """[n]: each row's last token that is not the padding id, else its first; transformers pools
        there."""
        last = micro.last.clamp(min=0)
        padding = padding_id(self.hf)
        if padding is None:
            return last
        flat = micro.input_ids.flatten()
        places = torch.arange(len(flat), device=flat.device)
        real = torch.where(flat != padding, places, -1).cummax(dim=0).values
        if micro.segments is None:
            first = torch.arange(len(last), device=flat.device) * micro.input_ids.shape[1]
        else:
            before = torch.cat([last.new_full((1,), -1), micro.last[:-1]])
            first = before.cummax(dim=0).values + 1
        return torch.maximum(real[last], first.clamp(max=len(flat) - 1))


def padding_id(hf: nn.Module) -> int | None:
    """The id that transformers skips at a row's end; None where the configuration has none, or one
    that is no token."""
    config: Any = hf.config.get_text_config()  # type: ignore[union-attr, operator]
    padding = getattr(config, "pad_token_id", None)
    return padding if isinstance(padding, int) and 0 <= padding < config.vocab_size else None


def _scalars(model: ModelWrapper, micro: MicroBatch, index: Tensor) -> Tensor:
    """[T]: the linear head at the flat positions `index`; only inside `forward`."""
    head = head_of(model.hf)
    hidden = model.hidden(micro, index).to(head.weight.dtype)
    # A sum of one: a new tensor, as FSDP needs, not a view.
    return _wide(head(hidden).sum(dim=-1))


def _wide(scalars: Tensor) -> Tensor:
    return scalars if scalars.dtype == torch.float64 else scalars.float()


def _linear_children(hf: nn.Module) -> list[nn.Linear]:
    return [child for child in hf.children() if isinstance(child, nn.Linear)]


def head_of(hf: nn.Module) -> nn.Linear:
    """The linear layer beside the backbone; raises InvalidValue where the family has another
    head."""
    heads = _linear_children(hf)
    if len(heads) != 1 or heads[0].out_features != 1:
        name = type(hf).__name__
        raise InvalidValue(
            f"{name} has no single linear head with one output",
            expected="one linear layer",
            actual=name,
        )
    return heads[0]


class AutoModelForValues:
    """A critic of any family: transformers' token classification, where that is a linear layer on
    the backbone, else ours.

    Ours is the family's language model with `score`, of one output, in the output head's place.
    """

    @staticmethod
    def from_config(config: Any, **more: Any) -> nn.Module:
        """The model of that configuration, as transformers' own classes make it; raises
        InvalidValue."""
        model: nn.Module = _value_class(config)._from_config(config, **more)
        return model


def _value_class(config: Any) -> Any:
    known: Any = AutoModelForTokenClassification._model_mapping
    causal: Any = AutoModelForCausalLM._model_mapping
    if type(config) in known:
        own = known[type(config)]
        with torch.device("meta"):
            model = own(config)
        beside = [
            child
            for child in model.children()
            if child is not model.base_model and list(child.parameters())
        ]
        if len(beside) == 1 and isinstance(beside[0], nn.Linear):
            return own
    if type(config) not in causal:
        raise InvalidValue(
            f"no critic can be made of a {config.model_type}: it is no causal language model"
        )
    return _with_value_head(causal[type(config)])


def _with_value_head(causal: Any) -> Any:
    def build(self: Any, config: Any) -> None:
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
    body = {
        "__init__": build,
        # else transformers takes it for custom code and converts no names
        "__module__": causal.__module__,
        "_tied_weights_keys": None,
        "get_output_embeddings": lambda self: None,
    }
    return type(f"{name}ForTokenClassification", (causal,), body)
