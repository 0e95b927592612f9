"""A language model's objectives: policy gradients, supervised learning, distillation as a policy
gradient (losses/formulas.py), and distillation towards a teacher's K most likely tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from nexrl_worker.training.batch.micro_batch import MicroBatch
from nexrl_worker.training.losses.formulas import (
    FUNCTIONS,
    PerToken,
    Tokens,
    kl_terms,
    select_tokens,
    top_k_kl,
)
from nexrl_worker.training.model.policy import PolicyModel, score_candidates
from nexrl_worker.training.model.wrapper import ModelWrapper
from nexrl_worker.training.objectives.base import Evaluated, MetricAccumulator, Totals
from nexrl_worker.training.prepare import CURRENT, LossSettings

_QUANTILES = {"min": 0.0, "p01": 0.01, "p50": 0.5, "p99": 0.99, "max": 1.0}
_NEAR = (0.9, 1.1)


class LanguageObjective:
    """loss = main - entropy_coeff x entropy + kl_coeff x KL, numerators all, in one mode and over
    one denominator.

    `names` are the tensors that the batch has of those the loss reads. `frozen` gives the reference
    model, asked for only where the KL term is on and a batch has no `ref_log_prob`.
    """

    prefix = "actor"

    def __init__(
        self,
        model: ModelWrapper,
        settings: LossSettings,
        names: tuple[str, ...],
        frozen: Callable[[], PolicyModel],
    ) -> None:
        self._policy = cast(PolicyModel, model)
        self._settings = settings
        self._names = names
        own = not settings.uses_kl or "ref_log_prob" in names
        self._reference = None if own else frozen()
        self.models: list[ModelWrapper] = [model]
        if self._reference is not None:
            self.models.append(self._reference)
        self.aggregation = settings.aggregation

    def _with_terms(
        self,
        main: Tensor,
        tokens: Tokens,
        entropies: Tensor,
        micro: MicroBatch,
        into: MetricAccumulator,
    ) -> Tensor:
        """The whole loss (0-dim) from `main` (0-dim), the tokens and entropies [n,R]."""
        mask, settings = micro.mask, self._settings
        entropy = self.aggregation.numerator(entropies, mask)
        loss = main - settings.entropy_coeff * entropy if settings.entropy_coeff != 0.0 else main
        into.add("policy", main)
        into.add("entropy", entropy)
        if settings.uses_kl:
            reference = torch.where(mask, self._reference_of(micro), 0.0)
            old = tokens.old if settings.kl_times_ratio else None
            terms = kl_terms(tokens.log_probs, reference, settings.kl_type, old)
            divergence = self.aggregation.numerator(terms, mask)
            loss = loss + settings.kl_coeff * divergence
            into.add("kl", divergence)
        into.add("loss", loss)
        into.count(micro, self.aggregation)
        return loss

    @torch.no_grad()
    def _reference_of(self, micro: MicroBatch) -> Tensor:
        """The reference's log-probabilities [n,R]."""
        if self._reference is None:
            return micro.values["ref_log_prob"]
        return self._reference.score(micro, entropy=False, all_labels=False)[0]

    def metrics(self, totals: Totals) -> dict[str, Any]:
        """See Objective: the parts of the loss, each over its denominator."""
        whole = self.aggregation.divisor(totals.sums["denominator"])
        found = {
            "actor/pg_loss": totals.sums["policy"] / whole,
            "actor/entropy_loss": totals.sums["entropy"] / whole,
        }
        if self._settings.uses_kl:
            found["actor/kl_loss"] = totals.sums["kl"] / whole
            found["actor/kl_loss_coef"] = self._settings.kl_coeff
        return found


class PolicyObjective(LanguageObjective):
    """A loss of the sampled tokens: a formula of losses/formulas.py."""

    def evaluate(self, micro: MicroBatch, into: MetricAccumulator) -> Evaluated:
        """See Objective; answers with `log_probs` where the loss is the client's own (`linear`)."""
        answers = self._settings.loss.weights
        log_probs, entropies = self._policy.score(micro, entropy=True, all_labels=answers)
        tokens = self._tokens(log_probs, micro, into)
        per_token = FUNCTIONS[self._settings.loss.name](tokens, self._settings.clip)
        weighted = per_token.loss * self._weights(tokens, micro, into)
        main = self.aggregation.numerator(weighted, micro.mask)
        loss = self._with_terms(main, tokens, entropies, micro, into)
        _count_ratios(tokens, per_token, micro.chosen, into)
        return Evaluated(loss, {"log_probs": log_probs.detach()} if answers else {})

    def metrics(self, totals: Totals) -> dict[str, Any]:
        """See Objective; docs/metrics.md says what each means."""
        found, sums = super().metrics(totals), totals.sums
        for name, (metric, of) in _SHARES.items():
            if name in sums:
                found[f"actor/{metric}"] = totals.share(name, of)
        if "ratio" in sums:
            found |= {
                f"actor/ratio_{name}": totals.quantile("ratio", level)
                for name, level in _QUANTILES.items()
            }
        if "clipped_low" in sums:
            found["actor/pg_clipfrac"] = (
                found["actor/pg_clipfrac_low"] + found["actor/pg_clipfrac_high"]
            )
        return found

    def _tokens(self, log_probs: Tensor, micro: MicroBatch, into: MetricAccumulator) -> Tokens:
        """The tokens of log_probs [n,R]; a teacher's term becomes their advantage."""
        values, mask, settings = micro.values, micro.mask, self._settings
        advantages = values.get("advantages")
        if settings.distillation is not None:
            teacher, current = values["teacher_log_probs"], log_probs.detach()
            into.add("teacher_gap", torch.where(mask, current - teacher, 0.0).sum())
            student = current if settings.student == CURRENT else values[settings.student]
            scaled = settings.distillation * torch.where(mask, teacher - student, 0.0)
            advantages = scaled if advantages is None else scaled + advantages
        return select_tokens(
            log_probs, mask, values.get("old_log_probs"), advantages, values.get("loss_weights")
        )

    @torch.no_grad()
    def _weights(
        self, tokens: Tokens, micro: MicroBatch, into: MetricAccumulator
    ) -> Tensor | float:
        """The rollout correction [n,R], else 1; counts the sampler's gap, at dropped tokens too."""
        if "rollout_log_probs" not in self._names:
            return 1.0
        sampled, old = micro.mask, tokens.old
        if micro.dropped is not None:
            sampled = sampled | micro.dropped
            old = torch.where(sampled, micro.values["old_log_probs"], 0.0)
        rollout = torch.where(sampled, micro.values["rollout_log_probs"], 0.0)
        gap = rollout - old
        into.add("compared", sampled.sum())
        into.add("mismatch", gap.sum())
        into.add("mismatch_k3", (torch.expm1(-gap) + gap).sum())
        correction = self._settings.correction
        if correction is None:
            return 1.0
        if correction.rejects:
            into.add("rejected", (sampled & ~correction.kept(old, rollout, sampled)).sum())
        weights = correction.weights(old, rollout, sampled)
        into.add("correction", torch.where(micro.mask, weights, 0.0).sum())
        return weights


_SHARES = {
    "teacher_gap": ("teacher_kl", "tokens"),
    "ratio": ("ratio_mean", "tokens"),
    "far": ("ratio_outside", "tokens"),
    "approximate_kl": ("ppo_kl", "tokens"),
    "clipped_low": ("pg_clipfrac_low", "tokens"),
    "clipped_high": ("pg_clipfrac_high", "tokens"),
    "clipped_dual": ("pg_clipfrac_dual", "tokens"),
    "mismatch": ("mismatch_kl", "compared"),
    "mismatch_k3": ("mismatch_k3", "compared"),
    "correction": ("rollout_weight_mean", "tokens"),
    "rejected": ("rollout_rejected_share", "compared"),
}
"""By the name of a sum: the metric's, and the sum that it is divided by."""


@torch.no_grad()
def _count_ratios(
    tokens: Tokens, per_token: PerToken, chosen: Tensor, into: MetricAccumulator
) -> None:
    """`chosen`: the scored tokens' places in [n*R]; finding them would wait for the device."""
    mask, ratio = tokens.mask, per_token.ratio
    if ratio is not None:
        kept = ratio.flatten()[chosen]
        into.add_values("ratio", kept)
        into.add("ratio", kept.sum())
        into.add("far", ((kept < _NEAR[0]) | (kept > _NEAR[1])).sum())
        into.add("approximate_kl", (tokens.old - tokens.log_probs).sum())
    if per_token.clipped_low is not None and per_token.clipped_high is not None:
        into.add("clipped_low", (mask & per_token.clipped_low).sum())
        into.add("clipped_high", (mask & per_token.clipped_high).sum())
    if per_token.clipped_dual is not None:
        into.add("clipped_dual", (mask & per_token.clipped_dual).sum())


class TopKObjective(LanguageObjective):
    """coefficient x KL over the teacher's K tokens and one bucket for the rest; `forward_kl` is
    KL(teacher||student)."""

    def evaluate(self, micro: MicroBatch, into: MetricAccumulator) -> Evaluated:
        """See Objective."""
        mask, settings = micro.mask, self._settings
        ids = torch.where(mask[..., None], micro.values["teacher_topk_ids"], 0)
        teacher = torch.where(mask[..., None], micro.values["teacher_topk_log_probs"], 0.0)
        scores = score_candidates(self._policy, micro, ids)
        forward = settings.loss.name == "forward_kl"
        apart = top_k_kl(scores.candidates, scores.rest, teacher, forward)
        divergence = torch.where(mask, apart, 0.0)
        into.add("teacher_kl", divergence.sum())
        assert settings.distillation is not None
        main = settings.distillation * self.aggregation.numerator(divergence, mask)
        tokens = select_tokens(scores.labels, mask, micro.values.get("old_log_probs"), None)
        return Evaluated(self._with_terms(main, tokens, scores.entropies, micro, into))

    def metrics(self, totals: Totals) -> dict[str, Any]:
        """See Objective; `actor/teacher_kl` is the mean over scored tokens."""
        teacher = totals.share("teacher_kl", "tokens")
        return {**super().metrics(totals), "actor/teacher_kl": teacher}
