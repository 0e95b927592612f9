"""The frozen model beside a group's own, which KL terms and compute_ref_log_prob score with."""

from __future__ import annotations

from typing import cast

import torch
from nexrl_contract.sections import ActorConfig

from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.model.build import Recipe, build_model
from nexrl_worker.training.model.policy import PolicyModel
from nexrl_worker.training.model.probe import Prober
from nexrl_worker.training.model.roles import ROLES
from nexrl_worker.training.model.wrapper import ModelWrapper


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
        """Find out how the loaded model may be computed, the same on all ranks. Collective; `check`
        tells what is wrong."""
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
