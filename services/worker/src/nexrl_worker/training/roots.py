"""The root module of every group: a Hugging Face model whose head runs in here, so that both are sharded together."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nexrl_worker.training.batch import MicroBatch
from nexrl_worker.training.packing import attention_of, use_attention, use_segments


class Root(nn.Module):
    """Wraps the model `hf`. Whatever needs gathered weights runs in `forward`, where FSDP's hooks are."""

    own_head = False
    """Whether the folder has a head of its own though its configuration ties it to the embedding."""

    def __init__(self, hf: nn.Module) -> None:
        super().__init__()
        self.hf = hf
        self._own_attention = attention_of(hf)

    @property
    def vocabulary(self) -> int:
        return int(self.hf.config.vocab_size)  # type: ignore[union-attr, arg-type]

    def forward(self, read: Callable[[], Any]) -> Any:
        """Run `read` with the weights gathered; returns new tensors, no views, as FSDP hooks its backward onto them."""
        return read()

    def outputs(self, micro: MicroBatch, whole: bool) -> Any:
        """What the model (`whole`: with its own head) answers to a micro-batch [n,C]; only inside `forward`.

        A packed one is answered as [1,C]. No cache: with one, packed rows would attend to one another.
        """
        model = self.hf if whole else self.hf.base_model
        more: dict[str, Any] = {}
        if micro.segments is None:
            use_attention(self.hf, self._own_attention)
        else:
            use_segments(self.hf)
            more["segments"] = micro.segments
        usual = taken(model, position_ids=micro.position_ids, use_cache=False)
        return model(  # type: ignore[operator]
            input_ids=micro.input_ids, attention_mask=micro.attention_mask, **usual, **more
        )

    def hidden(self, micro: MicroBatch, index: Tensor) -> Tensor:
        """Last hidden states [T,H] at the flat positions `index` [T]; only inside `forward`."""
        picked: Tensor = self.outputs(micro, whole=False).last_hidden_state.flatten(0, 1)[index]
        return picked


def taken(model: Any, **arguments: Any) -> dict[str, Any]:
    """Those of `arguments` that the model's forward takes: encoders know no cache, some families no positions."""
    known = inspect.signature(model.forward).parameters
    if any(part.kind is inspect.Parameter.VAR_KEYWORD for part in known.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in known}
