"""The read-only operations: what each computes from a micro-batch, by result name; and the frozen
model beside a group's own, which compute_ref_log_prob and KL terms score with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.distributed as dist
from nexrl_contract.sections import ActorConfig
from torch import Tensor

from nexrl_worker.training.batch.micro_batch import BatchReader, MicroBatch
from nexrl_worker.training.batch.plan import Micro, halves
from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.micro_batch_loop import Parts, drop, run_micro_batches
from nexrl_worker.training.model.build import Recipe, build_model
from nexrl_worker.training.model.policy import PolicyModel, top_k
from nexrl_worker.training.model.probe import Prober
from nexrl_worker.training.model.roles import ROLES
from nexrl_worker.training.model.value_head import RewardModel, ValueModel
from nexrl_worker.training.model.wrapper import ModelWrapper
from nexrl_worker.training.trainer import Result

Inference = Callable[[ModelWrapper, MicroBatch, int | None], dict[str, Tensor]]


def _log_probs(model: ModelWrapper, micro: MicroBatch, k: int | None) -> dict[str, Tensor]:
    policy = cast(PolicyModel, model)
    if k is None:
        return {"old_log_probs": policy.score(micro, entropy=False, all_labels=True)[0].float()}
    labels, ids, values = top_k(policy, micro, k)
    return {
        "old_log_probs": labels.float(),
        "teacher_topk_ids": ids,
        "teacher_topk_log_probs": values.float(),
    }


def _reference(model: ModelWrapper, micro: MicroBatch, k: int | None) -> dict[str, Tensor]:
    return {"ref_log_prob": _log_probs(model, micro, None)["old_log_probs"]}


def _values(model: ModelWrapper, micro: MicroBatch, k: int | None) -> dict[str, Tensor]:
    return {"values": cast(ValueModel, model).values(micro).float()}


def _rewards(model: ModelWrapper, micro: MicroBatch, k: int | None) -> dict[str, Tensor]:
    return {"rewards": cast(RewardModel, model).rewards(micro).float()}


# Results are [n,R] ([n,R,K] of the top k, [n] of rewards); 0 where a token is not attended.
INFERENCE: dict[str, Inference] = {
    "compute_log_prob": _log_probs,
    "compute_ref_log_prob": _reference,
    "compute_values": _values,
    "compute_rewards": _rewards,
}


@torch.no_grad()
def infer(
    operation: str, model: ModelWrapper, reader: BatchReader, micros: Sequence[Micro], k: int | None
) -> Result:
    """The operation's answers for the rows of this rank's micro-batches, as many as any rank has.
    Collective.

    Where memory runs out on a rank, it takes its rows from there on once more, half as many at a
    time, and the others go with it; `memory/retries` says how often. Raises DoesNotFit on all ranks
    where it runs out under a single row.
    """
    answers: dict[str, Parts] = {}

    def act(rows: Sequence[int], last: bool) -> dict[str, Tensor]:
        found = INFERENCE[operation](model, reader.read(rows), k)
        return {name: values.cpu() for name, values in found.items()}

    retries = 0
    while micros:
        ran = run_micro_batches([model], reader.device, micros, act)
        for name, parts in ran.answers.items():
            answers.setdefault(name, []).extend(parts)
        left = [] if ran.failed is None else halves(micros[ran.failed :])
        most = torch.tensor([len(left), ran.failed is not None], device=reader.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        length, again = most.tolist()
        if again:
            refusal = ran.does_not_fit(reader.device)
            drop([model])
            if refusal.row is not None:
                raise refusal
            retries += 1
        micros = [*left, *[()] * (length - len(left))]
    return Result({"memory/retries": retries} if retries else {}, answers)


# -- the frozen reference


class FrozenReference:
    """The model of `ref.model.path`, else of `model.path`: loaded (local), examined (collective),
    then used.

    It is of the family of the group's `own` model, but its configuration is its own (scaled logits,
    windows), and so is what a probe finds out about it. `packs`: the group's rows are packed, so
    the reference must bear it too.
    """

    def __init__(
        self, actor: ActorConfig, own: ModelWrapper, packs: bool, device: torch.device
    ) -> None:
        self.path: str = actor.ref.model.path or actor.model.path
        self.model: PolicyModel | None = None
        self.ready = False
        """Whether `examine` has been here: from then on `check` knows."""
        self._recipe = Recipe.of(actor, ROLES["ref"], device)
        self._own = own
        self._packs = packs
        self._refusal: str | None = None

    def load(self) -> None:
        """Read the folder unless it is read; raises InvalidValue where the model does not fit the
        group's. Local."""
        if self.model is not None or self.ready:
            return
        model = cast(PolicyModel, build_model(self.path, self._recipe))
        named = f"the reference model in {self.path}"
        family, own = model.config.model_type, self._own.config.model_type
        if family != own:  # the same ids mean other tokens
            raise InvalidValue(f"{named} is a {family}, the group's model a {own}")
        known, needed = model.vocabulary, self._own.vocabulary
        if known < needed:
            raise InvalidValue(f"{named} knows {known} tokens, the group's model {needed}")
        self.model = model

    def examine(self) -> None:
        """Find out how the model may be computed, for `check` to refuse it. Collective."""
        assert self.model is not None
        outcome = Prober(self.model, self._recipe, self._packs).run()
        self.model.fallback = outcome.reason
        named = f"the reference model in {self.path} cannot be"
        if outcome.refusal is not None:
            self._refusal = f"{named} used: {outcome.refusal}"
        elif self._packs and not outcome.packs:
            self._refusal = (
                f"{named} computed on packed rows ({outcome.packing_reason}), and the group packs: "
                "start it with model.use_remove_padding false, or send ref_log_prob"
            )
        if self._refusal is not None:
            self.model = None
        self.ready = True

    def check(self) -> None:
        """Raise InvalidValue if `examine` found that the group cannot use the model. Local."""
        if self._refusal is not None:
            raise InvalidValue(self._refusal)

    def policy(self) -> PolicyModel:
        """The model, loaded and examined if it is not yet. Collective then."""
        if not self.ready:
            self.load()
            self.examine()
        self.check()
        assert self.model is not None
        return self.model
