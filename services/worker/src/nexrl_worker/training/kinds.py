"""What a group of each role holds: which transformers class, which root around it, and whether it learns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.heads import AutoModelForValues, RewardModel, ValueModel
from nexrl_worker.training.roots import Root
from nexrl_worker.training.scorer import Scorer


@dataclass(frozen=True)
class Kind:
    """`fresh_head`: a folder without the head's weights starts with zeros, so that a critic's first values are 0."""

    auto: Any
    root: type[Root]
    trains: bool
    fresh_head: bool = False

    def prepare(self, config: Any) -> None:
        """Settle what the folder's configuration leaves open, or says of another head."""
        if self.fresh_head:
            config.num_labels = 1


KINDS = {
    "actor": Kind(AutoModelForCausalLM, Scorer, trains=True),
    "ref": Kind(AutoModelForCausalLM, Scorer, trains=False),
    "teacher": Kind(AutoModelForCausalLM, Scorer, trains=False),
    "critic": Kind(AutoModelForValues, ValueModel, trains=True, fresh_head=True),
    "reward": Kind(AutoModelForSequenceClassification, RewardModel, trains=False),
}


def kind_of(role: str) -> Kind:
    """The role's kind; raises InvalidValue with the known roles."""
    if role not in KINDS:
        raise InvalidValue(f"unknown role {role!r}", expected=", ".join(KINDS), actual=role)
    return KINDS[role]
