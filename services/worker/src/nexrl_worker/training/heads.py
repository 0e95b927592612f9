"""A critic and a reward model: one linear head on the same backbones that language models have."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nexrl_worker.training.batch import MicroBatch
from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.roots import Root


class ScalarHead(Root):
    """Wraps a transformers model whose only part beside the backbone is a linear layer with one output."""

    def __init__(self, hf: nn.Module) -> None:
        super().__init__(hf)
        head_of(hf)

    def _scalars(self, micro: MicroBatch, index: Tensor) -> Tensor:
        def read() -> Tensor:
            head = head_of(self.hf)
            hidden = self.hidden(micro, index).to(head.weight.dtype)
            # A sum of one: a new tensor, as FSDP needs, not a view.
            scalars: Tensor = head(hidden).sum(dim=-1)
            return scalars if scalars.dtype == torch.float64 else scalars.float()

        result: Tensor = self(read)
        return result


class ValueModel(ScalarHead):
    """The critic."""

    def values(self, micro: MicroBatch) -> Tensor:
        """[n,R]: the head at the column before each label (S-R-1+k), where the action k is chosen; 0 if not attended."""
        return micro.scatter(self._scalars(micro, micro.index))


class RewardModel(ScalarHead):
    """The reward model."""

    def rewards(self, micro: MicroBatch) -> Tensor:
        """[n]: the head at every row's last attended position; 0 for a row without any."""
        return torch.where(micro.last >= 0, self._scalars(micro, micro.last.clamp(min=0)), 0.0)


def head_of(hf: nn.Module) -> nn.Linear:
    """The linear layer beside the backbone; raises InvalidValue where the family has another head."""
    heads = [child for child in hf.children() if isinstance(child, nn.Linear)]
    if len(heads) != 1 or heads[0].out_features != 1:
        name = type(hf).__name__
        raise InvalidValue(
            f"{name} has no single linear head with one output", expected="one linear layer", actual=name
        )
    return heads[0]
