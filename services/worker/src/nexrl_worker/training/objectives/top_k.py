"""Distillation towards a teacher's K most likely tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from nexrl_worker.training.batch.micro_batch import MicroBatch
from nexrl_worker.training.losses.divergence import top_k_kl
from nexrl_worker.training.losses.policy import select_tokens
from nexrl_worker.training.model.candidates import score_candidates
from nexrl_worker.training.model.policy import PolicyModel
from nexrl_worker.training.model.wrapper import ModelWrapper
from nexrl_worker.training.objectives.base import Evaluated, count_batch
from nexrl_worker.training.objectives.metrics import MetricAccumulator, Totals
from nexrl_worker.training.objectives.terms import Terms
from nexrl_worker.training.prepare import LossSettings


class TopKObjective:
    """coefficient x KL over the teacher's K tokens and one bucket for the rest; `forward` is
    KL(teacher||student)."""

    prefix = "actor"

    def __init__(
        self,
        policy: PolicyModel,
        spec: LossSettings,
        names: tuple[str, ...],
        frozen: Callable[[], PolicyModel],
    ) -> None:
        self._policy = policy
        self._spec = spec
        self._terms = Terms(spec, names, frozen)
        self.models: Sequence[ModelWrapper] = [policy, *self._terms.models]
        self.aggregation = spec.aggregation

    def evaluate(self, micro: MicroBatch, accumulator: MetricAccumulator) -> Evaluated:
        """See Objective."""
        mask = micro.mask
        ids = torch.where(mask[..., None], micro.values["teacher_topk_ids"], 0)
        teacher = torch.where(mask[..., None], micro.values["teacher_topk_log_probs"], 0.0)
        scores = score_candidates(self._policy, micro, ids)
        forward = self._spec.top_k == "forward_kl"
        divergence = torch.where(
            mask, top_k_kl(scores.candidates, scores.rest, teacher, forward), 0.0
        )
        accumulator.add("teacher_kl", divergence.sum())
        assert self._spec.distillation is not None
        main = self._spec.distillation * self.aggregation.numerator(divergence, mask)
        tokens = select_tokens(scores.labels, mask, micro.values.get("old_log_probs"), None)
        loss = self._terms.add(main, tokens, scores.entropies, micro, accumulator)
        count_batch(micro, self.aggregation, accumulator)
        return Evaluated(loss)

    def metrics(self, totals: Totals) -> dict[str, Any]:
        """See Objective; `actor/teacher_kl` is the mean over scored tokens."""
        return {
            **self._terms.metrics(totals),
            "actor/teacher_kl": totals.share("teacher_kl", "tokens"),
        }

    def close(self) -> None:
        """See Objective."""
        self._terms.close()
