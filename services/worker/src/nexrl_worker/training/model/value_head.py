"""A critic and a reward model: a head with one output on a language model's backbone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from nexrl_worker.training.batch.micro_batch import MicroBatch
from nexrl_worker.training.batch.validate import Limits
from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.model.lm_head import at_least_float32
from nexrl_worker.training.model.wrapper import ModelWrapper, taken
from nexrl_worker.training.transformers_parts import text_config


class ValueModel(ModelWrapper):
    """The critic: a linear layer on the last hidden states, whatever its family's class does."""

    def __init__(self, hf: nn.Module) -> None:
        super().__init__(hf)
        head_of(hf)

    def values(self, micro: MicroBatch) -> Tensor:
        """[n,R]: the head at the column before each label, where its action is chosen; else 0."""
        return micro.scatter(self(lambda: _scalars(self, micro, micro.index)))


class RewardModel(ModelWrapper):
    """The reward model. `fallback` says why its family's own forward is used, not its head."""

    def __init__(self, hf: nn.Module) -> None:
        super().__init__(hf)
        labels = self.config.num_labels
        if labels != 1:
            message = f"{type(hf).__name__} has {labels} outputs, a reward model has one"
            raise InvalidValue(message, expected="num_labels 1", actual=str(labels))
        one = len(_linear_children(hf)) == 1
        self.fallback: str | None = None if one else "the head is not one linear layer"

    def rewards(self, micro: MicroBatch) -> Tensor:
        """[n]: every row's answer; 0 for a row without any token."""
        return torch.where(micro.last >= 0, self(lambda: self.answers(micro)), 0.0)

    def answers(self, micro: MicroBatch) -> Tensor:
        """[n]: by the linear head or by the family's own forward; only inside `forward`."""
        if self.fallback is not None:
            return self.own(micro.input_ids, micro.attention_mask)
        return _scalars(self, micro, self._places(micro))

    def own_limits(self, limits: Limits) -> Limits:
        """`limits` where the family counts positions: some begin after the padding id."""
        if self.fallback is None:
            return limits
        tables = [part for part in self.hf.modules() if isinstance(part, nn.Embedding)]
        kept = [part.padding_idx for part in tables if part.num_embeddings == limits.positions]
        first = max((number + 1 for number in kept if number is not None), default=0)
        most = None if limits.positions is None else limits.positions - first
        return replace(limits, positions=most, counts=True)

    def own(self, ids: Tensor, attention: Tensor | None) -> Tensor:
        """[n]: the model's own answers to rows [n,C], padded behind; only inside `forward`."""
        padding = padding_id(self.hf)
        if padding is not None and attention is not None:
            ids = torch.where(attention.bool(), ids, padding)
        self.rows.are(attention, None)
        more = taken(self.hf, use_cache=False)
        logits: Tensor = self.hf(input_ids=ids, attention_mask=attention, **more).logits
        return at_least_float32(logits.sum(dim=-1))

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
    """The id that transformers skips at a row's end; None where no token is that."""
    config = text_config(hf)
    padding = getattr(config, "pad_token_id", None)
    return padding if isinstance(padding, int) and 0 <= padding < config.vocab_size else None


def _scalars(model: ModelWrapper, micro: MicroBatch, index: Tensor) -> Tensor:
    """[T]: the linear head at the flat positions `index` [T]; only inside `forward`."""
    head = head_of(model.hf)
    hidden = model.hidden(micro, index).to(head.weight.dtype)
    # A sum of one: a new tensor, as FSDP needs, not a view.
    return at_least_float32(head(hidden).sum(dim=-1))


def _linear_children(hf: nn.Module) -> list[nn.Linear]:
    return [child for child in hf.children() if isinstance(child, nn.Linear)]


def head_of(hf: nn.Module) -> nn.Linear:
    """The linear layer beside the backbone; raises InvalidValue of another head."""
    heads = _linear_children(hf)
    if len(heads) != 1 or heads[0].out_features != 1:
        name = type(hf).__name__
        message = f"{name} has no single linear head with one output"
        raise InvalidValue(message, expected="one linear layer", actual=name)
    return heads[0]
