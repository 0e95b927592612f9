"""What an update minimises: a model's scores of a micro-batch, a loss of losses/, and the metrics
of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from nexrl_worker.training.heads import ValueModel
from nexrl_worker.training.losses.value import ValueLoss
from nexrl_worker.training.objectives.base import Objective
from nexrl_worker.training.objectives.policy import PolicyObjective
from nexrl_worker.training.objectives.top_k import TopKObjective
from nexrl_worker.training.objectives.value import ValueObjective
from nexrl_worker.training.roots import Root
from nexrl_worker.training.scorer import Scorer
from nexrl_worker.training.spec import Prepared, ValueSpec


def objective_of(prepared: Prepared, root: Root, reference: Callable[[], Scorer]) -> Objective:
    """What this operation minimises; the reference model is asked for only where its loss needs
    it."""
    loss = prepared.loss
    assert loss is not None
    if isinstance(loss, ValueSpec):
        return ValueObjective(cast(ValueModel, root), ValueLoss(loss.clip), loss.aggregation)
    kind = PolicyObjective if loss.top_k is None else TopKObjective
    return kind(cast(Scorer, root), loss, prepared.checked.names, reference)
