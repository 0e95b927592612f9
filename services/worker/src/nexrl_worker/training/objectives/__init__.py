"""What an update minimises: a model's scores of a micro-batch, a loss of losses/, and the metrics
of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from nexrl_worker.training.losses.value import ValueLoss
from nexrl_worker.training.model.policy import PolicyModel
from nexrl_worker.training.model.value_head import ValueModel
from nexrl_worker.training.model.wrapper import ModelWrapper
from nexrl_worker.training.objectives.base import Objective
from nexrl_worker.training.objectives.policy import PolicyObjective
from nexrl_worker.training.objectives.top_k import TopKObjective
from nexrl_worker.training.objectives.value import ValueObjective
from nexrl_worker.training.prepare import Prepared, ValueSettings


def objective_of(
    prepared: Prepared, model: ModelWrapper, reference: Callable[[], PolicyModel]
) -> Objective:
    """What this operation minimises; the reference model is asked for only where its loss needs
    it."""
    loss = prepared.loss
    assert loss is not None
    if isinstance(loss, ValueSettings):
        return ValueObjective(cast(ValueModel, model), ValueLoss(loss.clip), loss.aggregation)
    kind = PolicyObjective if loss.top_k is None else TopKObjective
    return kind(cast(PolicyModel, model), loss, prepared.checked.names, reference)
