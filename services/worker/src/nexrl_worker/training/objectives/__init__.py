"""What an update minimises: scores of a micro-batch, a loss of losses/, the metrics of both."""

from __future__ import annotations

from collections.abc import Callable

from nexrl_worker.training.model.policy import PolicyModel
from nexrl_worker.training.model.wrapper import ModelWrapper
from nexrl_worker.training.objectives.base import Objective
from nexrl_worker.training.objectives.policy import PolicyObjective, TopKObjective
from nexrl_worker.training.objectives.value import ValueObjective
from nexrl_worker.training.prepare import LossSettings, Prepared

Make = Callable[[ModelWrapper, LossSettings, tuple[str, ...], Callable[[], PolicyModel]], Objective]

OBJECTIVES: dict[str, Make] = {
    "labels": PolicyObjective,
    "candidates": TopKObjective,
    "values": ValueObjective,
}
"""By what a loss's row in :mod:`nexrl_contract.losses` says that it scores."""


def objective_of(
    prepared: Prepared, model: ModelWrapper, reference: Callable[[], PolicyModel]
) -> Objective:
    """What this operation minimises; the reference is asked for only if its loss needs it."""
    loss = prepared.loss
    assert loss is not None
    return OBJECTIVES[loss.loss.objective](model, loss, prepared.checked.names, reference)
