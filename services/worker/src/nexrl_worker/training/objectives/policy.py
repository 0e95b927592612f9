"""Policy gradients, supervised learning, and distillation as a policy gradient: a loss of
losses/policy.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nexrl_worker.training.batch.micro_batch import MicroBatch
from nexrl_worker.training.losses.policy import FUNCTIONS, PerToken, Tokens, select_tokens
from nexrl_worker.training.model.policy import PolicyModel
from nexrl_worker.training.model.wrapper import ModelWrapper
from nexrl_worker.training.objectives.base import Evaluated, count_batch
from nexrl_worker.training.objectives.metrics import MetricAccumulator, Totals
from nexrl_worker.training.objectives.terms import Terms
from nexrl_worker.training.prepare import CURRENT, LossSettings

_QUANTILES = {"min": 0.0, "p01": 0.01, "p50": 0.5, "p99": 0.99, "max": 1.0}
_NEAR = (0.9, 1.1)


class PolicyObjective:
    """`names` are the tensors that the batch has of those the loss reads."""

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
        self._names = names
        self._terms = Terms(spec, names, frozen)
        self.models: Sequence[ModelWrapper] = [policy, *self._terms.models]
        self.aggregation = spec.aggregation

    def evaluate(self, micro: MicroBatch, accumulator: MetricAccumulator) -> Evaluated:
        """See Objective; answers with `log_probs` where the loss is the client's own (`linear`)."""
        answers = self._spec.loss.weights
        log_probs, entropies = self._policy.score(micro, entropy=True, all_labels=answers)
        tokens = self._tokens(log_probs, micro, accumulator)
        per_token = FUNCTIONS[self._spec.loss.name](tokens, self._spec.clip)
        weighted = per_token.loss * self._weights(tokens, micro, accumulator)
        main = self.aggregation.numerator(weighted, micro.mask)
        loss = self._terms.add(main, tokens, entropies, micro, accumulator)
        count_batch(micro, self.aggregation, accumulator)
        _count_ratios(tokens, per_token, micro.chosen, accumulator)
        return Evaluated(loss, {"log_probs": log_probs.detach()} if answers else {})

    def metrics(self, totals: Totals) -> dict[str, Any]:
        """See Objective; docs/metrics.md says what each means."""
        found: dict[str, Any] = self._terms.metrics(totals)
        sums = totals.sums
        if self._spec.distillation is not None:
            found["actor/teacher_kl"] = totals.share("teacher_gap", "tokens")
        if "ratio" in sums:
            found["actor/ratio_mean"] = totals.share("ratio", "tokens")
            found["actor/ratio_outside"] = totals.share("far", "tokens")
            found |= {
                f"actor/ratio_{name}": totals.quantile("ratio", level)
                for name, level in _QUANTILES.items()
            }
            found["actor/ppo_kl"] = totals.share("approximate_kl", "tokens")
        if "clipped_low" in sums:
            found["actor/pg_clipfrac_low"] = totals.share("clipped_low", "tokens")
            found["actor/pg_clipfrac_high"] = totals.share("clipped_high", "tokens")
            found["actor/pg_clipfrac"] = (
                found["actor/pg_clipfrac_low"] + found["actor/pg_clipfrac_high"]
            )
        if "clipped_dual" in sums:
            found["actor/pg_clipfrac_dual"] = totals.share("clipped_dual", "tokens")
        if "mismatch" in sums:
            found["actor/mismatch_kl"] = totals.share("mismatch", "compared")
            found["actor/mismatch_k3"] = totals.share("mismatch_k3", "compared")
        if "correction" in sums:
            found["actor/rollout_weight_mean"] = totals.share("correction", "tokens")
        if "rejected" in sums:
            found["actor/rollout_rejected_share"] = totals.share("rejected", "compared")
        return found

    def close(self) -> None:
        """See Objective."""
        self._terms.close()

    def _tokens(
        self, log_probs: Tensor, micro: MicroBatch, accumulator: MetricAccumulator
    ) -> Tokens:
        values, mask = micro.values, micro.mask
        advantages = values.get("advantages")
        if self._spec.distillation is not None:
            teacher, current = values["teacher_log_probs"], log_probs.detach()
            accumulator.add("teacher_gap", torch.where(mask, current - teacher, 0.0).sum())
            student = current if self._spec.student == CURRENT else values[self._spec.student]
            scaled = self._spec.distillation * torch.where(mask, teacher - student, 0.0)
            advantages = scaled if advantages is None else scaled + advantages
        return select_tokens(
            log_probs, mask, values.get("old_log_probs"), advantages, values.get("loss_weights")
        )

    @torch.no_grad()
    def _weights(
        self, tokens: Tokens, micro: MicroBatch, accumulator: MetricAccumulator
    ) -> Tensor | float:
        """The rollout correction, 1 without one; counts how far the sampler was from `old`, at
        dropped tokens too."""
        if "rollout_log_probs" not in self._names:
            return 1.0
        sampled, old = micro.mask, tokens.old
        if micro.dropped is not None:
            sampled = sampled | micro.dropped
            old = torch.where(sampled, micro.values["old_log_probs"], 0.0)
        rollout = torch.where(sampled, micro.values["rollout_log_probs"], 0.0)
        gap = rollout - old
        accumulator.add("compared", sampled.sum())
        accumulator.add("mismatch", gap.sum())
        accumulator.add("mismatch_k3", (torch.expm1(-gap) + gap).sum())
        correction = self._spec.correction
        if correction is None:
            return 1.0
        if correction.rejects:
            accumulator.add("rejected", (sampled & ~correction.kept(old, rollout, sampled)).sum())
        weights = correction.weights(old, rollout, sampled)
        accumulator.add("correction", torch.where(micro.mask, weights, 0.0).sum())
        return weights


@torch.no_grad()
def _count_ratios(
    tokens: Tokens, per_token: PerToken, chosen: Tensor, accumulator: MetricAccumulator
) -> None:
    """`chosen`: the flat places of the scored tokens; to find them in the mask, the device would be
    waited for."""
    mask, ratio = tokens.mask, per_token.ratio
    if ratio is not None:
        kept = ratio.flatten()[chosen]
        accumulator.add_values("ratio", kept)
        accumulator.add("ratio", kept.sum())
        accumulator.add("far", ((kept < _NEAR[0]) | (kept > _NEAR[1])).sum())
        accumulator.add("approximate_kl", (tokens.old - tokens.log_probs).sum())
    if per_token.clipped_low is not None and per_token.clipped_high is not None:
        accumulator.add("clipped_low", (mask & per_token.clipped_low).sum())
        accumulator.add("clipped_high", (mask & per_token.clipped_high).sum())
    if per_token.clipped_dual is not None:
        accumulator.add("clipped_dual", (mask & per_token.clipped_dual).sum())
