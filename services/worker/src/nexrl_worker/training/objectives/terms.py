"""The entropy and KL terms that stand beside every policy loss, in its mode and over its
denominator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nexrl_worker.training.batch.micro_batch import MicroBatch
from nexrl_worker.training.fsdp2 import release
from nexrl_worker.training.losses.aggregation import Aggregation
from nexrl_worker.training.losses.divergence import kl_terms
from nexrl_worker.training.losses.policy import Tokens
from nexrl_worker.training.model.policy import PolicyModel
from nexrl_worker.training.model.wrapper import ModelWrapper
from nexrl_worker.training.objectives.metrics import MetricAccumulator, Totals
from nexrl_worker.training.prepare import LossSettings


class Terms:
    """loss = main - entropy_coeff x entropy + kl_coeff x KL, numerators all.

    `frozen` gives the reference model, asked for only when the KL term is on and a batch has no
    `ref_log_prob`.
    """

    def __init__(
        self, spec: LossSettings, names: tuple[str, ...], frozen: Callable[[], PolicyModel]
    ) -> None:
        self._spec = spec
        self._reference = frozen() if spec.uses_kl and "ref_log_prob" not in names else None

    @property
    def models(self) -> list[ModelWrapper]:
        """The models that a term runs."""
        return [] if self._reference is None else [self._reference]

    @property
    def _aggregation(self) -> Aggregation:
        return self._spec.aggregation

    def add(
        self,
        main: Tensor,
        tokens: Tokens,
        entropies: Tensor,
        micro: MicroBatch,
        accumulator: MetricAccumulator,
    ) -> Tensor:
        """The whole loss (0-dim) from `main` (0-dim), the tokens and entropies [n,R]."""
        mask, spec = micro.mask, self._spec
        entropy = self._aggregation.numerator(entropies, mask)
        loss = main - spec.entropy_coeff * entropy if spec.entropy_coeff != 0.0 else main
        accumulator.add("policy", main)
        accumulator.add("entropy", entropy)
        if spec.uses_kl:
            reference = torch.where(mask, self._reference_of(micro), 0.0)
            old = tokens.old if spec.kl_times_ratio else None
            terms = kl_terms(tokens.log_probs, reference, spec.kl_type, old)
            divergence = self._aggregation.numerator(terms, mask)
            loss = loss + spec.kl_coeff * divergence
            accumulator.add("kl", divergence)
        accumulator.add("loss", loss)
        return loss

    @torch.no_grad()
    def _reference_of(self, micro: MicroBatch) -> Tensor:
        if self._reference is None:
            return micro.values["ref_log_prob"]
        return self._reference.score(micro, entropy=False, all_labels=False)[0]

    def metrics(self, totals: Totals) -> dict[str, float]:
        """The parts of the loss, each over its denominator."""
        whole = self._aggregation.divisor(totals.sums["denominator"])
        found = {
            "actor/pg_loss": totals.sums["policy"] / whole,
            "actor/entropy_loss": totals.sums["entropy"] / whole,
        }
        if self._spec.uses_kl:
            found["actor/kl_loss"] = totals.sums["kl"] / whole
            found["actor/kl_loss_coef"] = self._spec.kl_coeff
        return found

    def close(self) -> None:
        """Free the reference's gathered weights."""
        if self._reference is not None:
            release(self._reference)
