"""The model wrapper of every group: a Hugging Face model whose head runs in here, and the one that
says what of it trains, what is frozen and what is exported."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from nexrl_worker.training.batch.micro_batch import MicroBatch
from nexrl_worker.training.batch.packing import use_segments
from nexrl_worker.training.fsdp2 import Collective
from nexrl_worker.training.model.rotary import Rotations, position_limit
from nexrl_worker.training.model.weights import Shard, shard_of
from nexrl_worker.training.transformers_parts import attention_of, text_config, use_attention


class ModelWrapper(nn.Module):
    """Wraps the model `hf`, so that body and head are sharded together.

    Whatever needs gathered weights runs in `forward`, where FSDP's hooks are. Optimizer, state,
    fingerprint, export and footprint ask this object which weights are theirs; none of them walks
    the model's parameters. Names are those of Hugging Face.
    """

    own_head = False
    """Whether the folder has an own head though its configuration ties it to the embedding."""

    def __init__(self, hf: nn.Module) -> None:
        super().__init__()
        self.hf = hf
        self.rows = Rotations(hf)
        self.collectives: list[Collective] = []
        self.own_attention = attention_of(hf)

    # -- what trains, what is frozen, what is exported

    def named_trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that an optimizer steps, by name; a tied head appears once."""
        return {name: param for name, param in self.hf.named_parameters() if param.requires_grad}

    def trainable_shards(self) -> Iterator[Shard]:
        """This rank's part of every parameter that trains."""
        return (shard_of(name, param) for name, param in self.named_trainable().items())

    def frozen_state(self) -> Iterator[Shard]:
        """What belongs to the model and never trains: this rank's part of frozen parameters, and
        the saved buffers, which every rank holds whole."""
        for name, param in self.hf.named_parameters():
            if not param.requires_grad:
                yield shard_of(name, param)
        saved = self.hf.state_dict(keep_vars=True).keys()
        for name, buffer in self.hf.named_buffers():
            if name in saved:
                yield Shard(name, buffer.detach(), tuple(buffer.shape), 0, replicated=True)

    def weights(self) -> Iterator[Shard]:
        """All that the model is made of: what trains, then the frozen state."""
        yield from self.trainable_shards()
        yield from self.frozen_state()

    def exported(self) -> Iterator[Shard]:
        """What a Hugging Face folder of this model holds, and its fingerprint covers."""
        return self.weights()

    # -- what it knows of its family

    @property
    def vocabulary(self) -> int:
        return int(self.text_config.vocab_size)

    @property
    def config(self) -> PretrainedConfig:
        """The configuration of the whole model."""
        config: PretrainedConfig = self.hf.config  # type: ignore[assignment]
        return config

    @property
    def text_config(self) -> PretrainedConfig:
        """The configuration of the language model, which may be one part of the model."""
        return text_config(self.hf)

    @property
    def has_body(self) -> bool:
        """Whether the model has a part without its head, which answers with hidden states."""
        return self.hf.base_model is not self.hf

    @property
    def positions(self) -> int | None:
        """How many tokens a row may have (None: no limit): see `position_limit`."""
        return position_limit(self.hf)

    # -- computing

    def forward(self, read: Callable[[], Any]) -> Any:
        """Run `read` with the weights gathered; returns new tensors, no views, as FSDP hooks its
        backward onto them."""
        self.rows.are(None, None)
        return read()

    def outputs(self, micro: MicroBatch, whole: bool) -> Any:
        """What the model (`whole`: with its own head) answers to a micro-batch [n,C]; only inside
        `forward`.

        A packed one is answered as [1,C]. No cache: with one, packed rows would attend to one
        another.
        """
        model = self.hf if whole else self.hf.base_model
        more: dict[str, Any] = {}
        self.rows.are(micro.attention_mask, micro.segments)
        if micro.segments is None:
            use_attention(self.hf, self.own_attention)
        else:
            use_segments(self.hf)
            more["segments"] = micro.segments
        usual = taken(model, position_ids=micro.position_ids, use_cache=False)
        return model(  # type: ignore[operator]
            input_ids=micro.input_ids, attention_mask=micro.attention_mask, **usual, **more
        )

    def hidden(self, micro: MicroBatch, index: Tensor | None = None) -> Tensor:
        """Last hidden states [T,H] at the flat positions `index` [T], else at the tokens that
        predict the labels; only inside `forward`."""
        states: Tensor = self.outputs(micro, whole=False).last_hidden_state
        return states.flatten(0, 1)[micro.index if index is None else index]

    def own_logits(self, micro: MicroBatch) -> Tensor:
        """The family's own logits [T,V] where labels are predicted; only inside `forward`."""
        logits: Tensor = self.outputs(micro, whole=True).logits
        return logits.flatten(0, 1)[micro.index]


def taken(model: Any, **arguments: Any) -> dict[str, Any]:
    """Those of `arguments` that the model's forward takes: encoders know no cache, some families no
    positions."""
    known = inspect.signature(model.forward).parameters
    if any(part.kind is inspect.Parameter.VAR_KEYWORD for part in known.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in known}
