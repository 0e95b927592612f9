"""The frozen model beside a group's own, which KL terms and compute_ref_log_prob score with."""

from __future__ import annotations

from typing import cast

import torch
from nexrl_contract.sections import ActorConfig

from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.model.build import Precision, load_model
from nexrl_worker.training.model.policy import PolicyModel
from nexrl_worker.training.model.probe import probed, strictest
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
        self.path: str = (actor.ref.model.path if actor.ref else None) or actor.model.path
        self.model: PolicyModel | None = None
        self._actor = actor
        self._own = own
        self._packs = packs
        self._device = device
        self._refusal: str | None = None
        self._examined = False

    @property
    def ready(self) -> bool:
        """Whether `examine` has been here: from then on `check` knows."""
        return self._examined

    def load(self) -> None:
        """Read the folder unless it is read; raises InvalidValue where the model does not fit the
        group's. Local."""
        if self.model is not None or self._examined:
            return
        model = cast(
            PolicyModel,
            load_model(self._actor, self.path, self._device, ROLES["ref"], trainable=False),
        )
        family, own = model.hf.config.model_type, self._own.hf.config.model_type  # type: ignore[union-attr]
        if family != own:  # the same ids mean other tokens
            raise InvalidValue(
                f"the reference model in {self.path} is a {family}, the group's model a {own}"
            )
        known, needed = model.vocabulary, self._own.vocabulary
        if known < needed:
            raise InvalidValue(
                f"the reference model in {self.path} knows {known} tokens, the group's model "
                f"{needed}"
            )
        self.model = model

    def examine(self) -> None:
        """Find out how the loaded model may be computed, the same on all ranks. Collective; `check`
        tells what is wrong."""
        assert self.model is not None
        dtype = Precision.of(self._actor.fsdp_config, self._device).param
        outcome = strictest(probed(self.model, self._device, dtype, self._packs), self._device)
        self.model.fallback = outcome.reason
        if outcome.refusal is not None:
            self._refusal = f"the reference model in {self.path} cannot be used: {outcome.refusal}"
            self.model = None
        elif self._packs and not outcome.packs:
            self._refusal = (
                f"the reference model in {self.path} cannot be computed on packed rows "
                f"({outcome.packing_reason}), and "
                "the group packs: start it with model.use_remove_padding false, or send "
                "ref_log_prob"
            )
            self.model = None
        self._examined = True

    def check(self) -> None:
        """Raise InvalidValue if `examine` found that the group cannot use the model. Local."""
        if self._refusal is not None:
            raise InvalidValue(self._refusal)

    def policy(self) -> PolicyModel:
        """The model, loaded and examined if it is not yet. Collective then."""
        if not self._examined:
            self.load()
            self.examine()
        self.check()
        assert self.model is not None
        return self.model
