"""Distillation towards a teacher's K most likely tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from nexrl_worker.training.batch import MicroBatch
from nexrl_worker.training.candidates import score_candidates
from nexrl_worker.training.losses.divergence import top_k_kl
from nexrl_worker.training.losses.policy import select_tokens
from nexrl_worker.training.objectives.base import Evaluated, count_batch
from nexrl_worker.training.objectives.tally import Tally, Totals
from nexrl_worker.training.objectives.terms import Terms
from nexrl_worker.training.roots import Root
from nexrl_worker.training.scorer import Scorer
from nexrl_worker.training.spec import LossSpec


class TopKObjective:
    """coefficient x KL over the teacher's K tokens and one bucket for the rest; `forward` is
    KL(teacher||student)."""

    prefix = "actor"

    def __init__(
        self, scorer: Scorer, spec: LossSpec, names: tuple[str, ...], frozen: Callable[[], Scorer]
    ) -> None:
        self._scorer = scorer
        self._spec = spec
        self._terms = Terms(spec, names, frozen)
        self.roots: Sequence[Root] = [scorer, *self._terms.roots]
        self.aggregation = spec.aggregation

    def evaluate(self, micro: MicroBatch, tally: Tally) -> Evaluated:
        """See Objective."""
        mask = micro.mask
        ids = torch.where(mask[..., None], micro.values["teacher_topk_ids"], 0)
        teacher = torch.where(mask[..., None], micro.values["teacher_topk_log_probs"], 0.0)
        scores = score_candidates(self._scorer, micro, ids)
        forward = self._spec.top_k == "forward_kl"
        divergence = torch.where(
            mask, top_k_kl(scores.candidates, scores.rest, teacher, forward), 0.0
        )
        tally.add("teacher_kl", divergence.sum())
        assert self._spec.distillation is not None
        main = self._spec.distillation * self.aggregation.numerator(divergence, mask)
        tokens = select_tokens(scores.labels, mask, micro.values.get("old_log_probs"), None)
        loss = self._terms.add(main, tokens, scores.entropies, micro, tally)
        count_batch(micro, self.aggregation, tally)
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
