"""Finds out at `init_model` whether a model may be computed in chunks of its head, and packed.

Each fast way is compared with the model's own forward on a tiny input, and used where they agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nexrl_worker.training.batch.micro_batch import MicroBatch, TinyRows
from nexrl_worker.training.batch.packing import narrowed_windows, unlike_configured
from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.fsdp2 import forget_kept_back, release
from nexrl_worker.training.model.build import Recipe
from nexrl_worker.training.model.policy import PolicyModel
from nexrl_worker.training.model.value_head import RewardModel, ValueModel, padding_id
from nexrl_worker.training.model.wrapper import ModelWrapper, taken
from nexrl_worker.training.transformers_parts import text_config, use_attention

_NAN = float("nan")
_ELSEWHERE = "another rank found a difference"
_LONGEST_REASON = 300
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
# Of packed from padded rows: some families compute softmax or norms in float32 whatever the dtype.
_PACKED_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
# In bfloat16 30 layers differ by 0.8 % of the peak from rounding alone, rows that see each other by
# more than 10 %.
_PACKED_TOLERANCE_HALF = 4e-2
# In half precision a token may go to other experts when it stands beside others; a layer left out
# is all of an answer.
_EXPERTS_TOLERANCE_HALF = 2e-1
_PEAK = 50.0
_SPECIAL = ("_token_id", "_token_index")
_LENGTHS = (9, 4, 7)
# The tiny rows are shorter than any window: packed and padded ones are compared at this one.
_WINDOW = 3


@dataclass(frozen=True)
class Probe:
    """Outcome: `difference` of chunked log-probabilities from the model's own, `packed_difference`
    of packed ones.

    `reason` None: log-probabilities are chunked, rewards are by the linear head; else by the
    model's own forward. `packs`: rows are packed; `packing_reason` says why not where it was asked
    for. `refusal`: why no way is right. A difference is NaN where it was not measured.
    """

    difference: float
    reason: str | None
    packs: bool = False
    packed_difference: float = _NAN
    packing_reason: str | None = None
    refusal: str | None = None

    def check(self) -> None:
        """Raise InvalidValue if no way is right."""
        if self.refusal is not None:
            raise InvalidValue(self.refusal)


def _refused(reason: str, difference: float = _NAN, fallback: str | None = None) -> Probe:
    return Probe(difference, fallback, refusal=reason[:_LONGEST_REASON])


class Prober:
    """Tries out one model, computing in `recipe.precision.param`; `packing`: also packed rows."""

    def __init__(self, model: ModelWrapper, recipe: Recipe, packing: bool = False) -> None:
        self._model = model
        self._device = recipe.device
        self._dtype = recipe.precision.param
        self._packing = packing
        self._name = type(model.hf).__name__

    def run(self) -> Probe:
        """As `compare`, then a tiny backward where the model trains; the strictest of what any rank
        found, as ranks must compute alike. Collective.

        Errors are the family's and a refusal like another: all ranks meet them in step.
        """
        return _strictest(self._tried(), self._device)

    def _tried(self) -> Probe:
        failing = "be tried out"
        try:
            outcome = self.compare()
            if outcome.refusal is None and self._model.named_trainable():
                failing = "be trained"
                self._go_backward(outcome)
            return outcome
        except (MemoryError, torch.OutOfMemoryError, dist.DistError):  # this rank's alone
            raise
        except Exception as error:
            return _refused(f"{self._name} cannot {failing}: {type(error).__name__}: {error}")

    def _go_backward(self, outcome: Probe) -> None:
        """One forward and backward as training runs them; no gradient stays. Collective."""
        model = self._model
        micro = self._tiny(packed=outcome.packs)
        try:
            if isinstance(model, PolicyModel):
                with _fallback(model, outcome.reason):
                    answers = torch.stack(model.score(micro, entropy=True, all_labels=True))
            else:
                assert isinstance(model, ValueModel)
                answers = model.values(micro)
            answers.sum().backward()  # type: ignore[no-untyped-call]
        finally:
            model.zero_grad()
            forget_kept_back(model)
            release(model)

    @torch.no_grad()
    def compare(self) -> Probe:
        """Compare each way with the model's own on a tiny input. Collective; leaves no gathered
        weights behind.

        A language model's hidden states are scaled up until the logits reach 50: a fresh model's
        small ones would hide a soft cap. Sets nothing: the caller stores `reason` as the model's
        `fallback`.
        """
        model = self._model
        try:
            use_attention(model.hf, model.own_attention)
            if isinstance(model, PolicyModel):
                return self._language_model(model)
            outcome = Probe(_NAN, None)
            if isinstance(model, RewardModel):
                outcome = self._rewards(model)
            elif isinstance(model, ValueModel):
                outcome = self._values(model)
            if outcome.reason is not None and self._packing:
                return replace(outcome, packing_reason=outcome.reason)
            scale = float(self._answer(self._tiny(packed=False), []).abs().max())
            return self._with_packing(outcome, max(scale, 1e-6))
        finally:
            release(model)

    # -- language models

    def _language_model(self, policy: PolicyModel) -> Probe:
        known = policy.fallback
        refusal = self._misread(policy)
        if refusal is not None:
            return _refused(refusal, fallback=known)
        micro = self._tiny(packed=False)
        peak: list[float] = []
        watch = policy.hf.register_forward_hook(
            lambda module, args, output: peak.append(float(output.logits.abs().max()))
        )
        with _fallback(policy, "probe"):
            _scores(policy, micro)
            watch.remove()
            with _enlarged(policy, _PEAK / max(peak[0], 1e-6)):
                own = _scores(policy, micro)  # the family's own logits: fallback is still set
                policy.fallback = known
                outcome = Probe(_NAN, known)
                if known is None:
                    outcome = self._chunked(policy, micro, own)
                policy.fallback = outcome.reason
                return self._with_packing(outcome, _PEAK)

    def _chunked(self, policy: PolicyModel, micro: MicroBatch, own: Tensor) -> Probe:
        """Log-probabilities by chunks of the head against the family's `own` [n,R]."""
        failures: list[str] = []
        found = self._caught(lambda: policy.hidden(micro), failures)
        if failures or found.shape[1:] != policy.head_inputs:
            why = failures[0] if failures else "they are not what its head takes"
            reason = f"the family does not give its hidden states: {why}"
            return Probe(_NAN, reason[:_LONGEST_REASON])
        difference = float((own - _scores(policy, micro)).abs().max())
        if difference <= _TOLERANCE.get(self._dtype, 1e-2) * _PEAK:
            return Probe(difference, None)
        reason = (
            f"the model's own logits differ from its linear head by {difference:.2g} (scaled or "
            "capped logits)"
        )
        return Probe(difference, reason)

    def _misread(self, policy: PolicyModel) -> str | None:
        """Why log-probabilities would be wrong: our rows beside one another against each alone.

        The last token is only asked for, so a model whose earlier answers change with it has read
        ahead.
        """
        hf, micro = policy.hf, self._plain()
        failures: list[str] = []

        def logits(row: Tensor) -> Tensor:
            """[L,V] of the row [1,L]."""
            answer: Tensor = hf(input_ids=row, **taken(hf, use_cache=False)).logits
            return answer[0] + 0.0  # a new tensor, as FSDP needs

        rows = _alone(micro)
        alone = [self._caught(partial(logits, row), failures) for row in rows]
        other = [self._caught(partial(logits, _ending_otherwise(row)), failures) for row in rows]
        found = self._caught(lambda: policy.own_logits(micro), failures)
        if failures:
            return f"{self._name} cannot answer a row of text: {failures[0]}"
        truth, tolerance = torch.cat([row[:-1] for row in alone]), self._tolerance()
        if _relative(torch.cat([row[:-1] for row in other]), truth) > tolerance:
            return (
                f"{self._name} reads a row in both directions, so what it says of a token would "
                "know the token"
            )
        difference = _relative(found, truth)
        if difference > tolerance:
            return (
                f"{self._name} answers rows beside others otherwise than each alone: by "
                f"{difference:.2g} of their size"
            )
        return None

    # -- reward models and critics

    def _rewards(self, model: RewardModel) -> Probe:
        """Rows beside one another against each alone and as it comes: what a user of transformers
        sees."""
        micro, known = self._plain(), model.fallback
        failures: list[str] = []
        with _terms(model.hf) as terms:
            alone = [self._caught(partial(model.own, row, None), failures) for row in _alone(micro)]
        if failures:
            refusal = f"{self._name} cannot answer a row: {failures[0]}"
            return _refused(refusal, fallback=known)
        truth, difference, reason = torch.cat(alone), _NAN, known
        if known is None:
            found = self._caught(lambda: model.answers(micro), failures)
            difference = _relative(found, truth, max(terms))
            if not failures and difference <= self._tolerance():
                return Probe(difference, None)
            reason = (
                f"the model's own answers differ from its linear head by {difference:.2g} (a "
                "layer between)"
            )
        failures = []
        with _fallback(model, reason):
            found = self._caught(lambda: model.answers(micro), failures)
        own = _relative(found, truth, max(terms))
        if not failures and own <= self._tolerance():
            return Probe(difference, reason)
        why = failures[0] if failures else f"by {own:.2g} of their size"
        refusal = f"{self._name} answers rows beside others otherwise than each alone: {why}"
        return _refused(refusal, difference, reason)

    def _values(self, model: ValueModel) -> Probe:
        """Hidden states of rows beside one another, at our positions, against each alone."""
        micro = self._plain()
        failures: list[str] = []

        def hidden(row: Tensor) -> Tensor:
            """[L-1,H] of the row [1,L]."""
            base: Any = model.hf.base_model
            states: Tensor = base(input_ids=row, **taken(base, use_cache=False)).last_hidden_state
            return states[0, :-1] + 0.0  # a new tensor, as FSDP needs

        alone = [self._caught(partial(hidden, row), failures) for row in _alone(micro)]
        found = self._caught(lambda: model.hidden(micro), failures)
        if failures:
            return _refused(f"no critic can be made of {self._name}: {failures[0]}")
        difference = _relative(found, torch.cat(alone))
        if difference <= self._tolerance():
            return Probe(difference, None)
        refusal = (
            f"no critic can be made of {self._name}: rows beside others differ from each alone by "
            f"{difference:.2g}"
        )
        return Probe(difference, None, refusal=refusal)

    # -- packing

    def _with_packing(self, outcome: Probe, scale: float) -> Probe:
        """`outcome` with what packing does to log-probabilities (hidden states without a head)."""
        if not self._packing:
            return outcome
        packed = self._tiny(packed=True)
        assert packed.segments is not None
        failures: list[str] = []
        with narrowed_windows(self._model.hf, _WINDOW):
            own = self._answer(self._tiny(packed=False), failures)
            found = self._answer(packed, failures)
            difference = _NAN if failures else float((own - found).abs().max())
            if failures:
                reason: str | None = f"the model cannot run packed: {failures[0]}"[:_LONGEST_REASON]
            else:
                reason = unlike_configured(self._model.hf, packed.segments)
        most = _PACKED_TOLERANCE.get(self._dtype, _PACKED_TOLERANCE_HALF) * scale
        if reason is None and not difference <= most:
            reason = f"packed rows differ from padded ones by {difference:.2g}"
        return Probe(outcome.difference, outcome.reason, reason is None, difference, reason)

    def _answer(self, micro: MicroBatch, failures: list[str]) -> Tensor:
        """Log-probabilities [T] in the way that `fallback` says, or hidden states [T,H]; what a
        family raises goes to `failures`."""
        model = self._model

        def read() -> Tensor:
            if not isinstance(model, PolicyModel):
                return model.hidden(micro)
            if model.fallback is None:
                weight, bias = model.head()
                logits = F.linear(model.hidden(micro).to(weight.dtype), weight, bias)
            else:
                logits = model.own_logits(micro)
            return torch.log_softmax(logits, dim=-1).gather(1, micro.labels[:, None]).sum(dim=1)

        return self._caught(read, failures)

    # -- inputs, and what is measured of them

    def _tiny(self, packed: bool) -> MicroBatch:
        return TinyRows(self._model.vocabulary, _LENGTHS).micro_batch(self._device, packed)

    def _plain(self) -> MicroBatch:
        """Rows of ordinary tokens, one of which ends in the padding id where there is one."""
        hf, config = self._model.hf, self._model.text_config
        said = {**self._model.config.to_dict(), **config.to_dict()}
        special = {
            value
            for key, value in said.items()
            if key.endswith(_SPECIAL) and isinstance(value, int)
        }
        rows = TinyRows(config.vocab_size, _LENGTHS, special, padding_id(hf))
        return rows.micro_batch(self._device)

    def _tolerance(self) -> float:
        known = text_config(self._model.hf).to_dict()
        routed = any("expert" in key and value for key, value in known.items())
        half = _EXPERTS_TOLERANCE_HALF if routed else _PACKED_TOLERANCE_HALF
        return _PACKED_TOLERANCE.get(self._dtype, half)

    def _caught(self, read: Callable[[], Tensor], failures: list[str]) -> Tensor:
        """What `read` gives inside the model's forward; what a family raises there goes to
        `failures`.

        FSDP does not put a root back that was left by an exception.
        """

        def attempt() -> Tensor:
            try:
                return read()
            # What a family makes of an argument that it does not know is its own affair.
            except Exception as error:
                failures.append(str(error) or type(error).__name__)
                return torch.zeros(())

        answer: Tensor = self._model(attempt)
        return answer


@contextmanager
def _fallback(model: PolicyModel | RewardModel, reason: str | None) -> Iterator[None]:
    """The model's `fallback` is `reason` inside the block, unless the block changes it."""
    known, model.fallback = model.fallback, reason
    try:
        yield
    finally:
        model.fallback = known


def _scores(policy: PolicyModel, micro: MicroBatch) -> Tensor:
    return policy.score(micro, entropy=False, all_labels=True)[0]


@contextmanager
def _enlarged(policy: PolicyModel, scale: float) -> Iterator[None]:
    """Hidden states times `scale` inside the block."""

    def enlarge(module: nn.Module, args: object, output: Any) -> object:
        output.last_hidden_state = output.last_hidden_state * scale
        return output

    if not policy.has_body:
        yield
        return
    hook = policy.hf.base_model.register_forward_hook(enlarge)  # type: ignore[union-attr]
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _terms(hf: nn.Module) -> Iterator[list[float]]:
    """The length of the products that heads of one output sum up inside the block: rounding goes by
    it.

    A sum may be near 0 where they cancel, and then says nothing of what a difference means.
    """
    found = [0.0]

    def note(head: Any, args: tuple[Tensor, ...]) -> None:
        found.append(float((args[0] * head.weight).float().norm(dim=-1).max()))

    linear = (part for part in hf.modules() if isinstance(part, nn.Linear))
    hooks = [head.register_forward_pre_hook(note) for head in linear if head.out_features == 1]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _alone(micro: MicroBatch) -> list[Tensor]:
    """The rows' ids [1,L] without padding."""
    assert micro.attention_mask is not None
    lengths = micro.attention_mask.sum(dim=1).tolist()
    return [micro.input_ids[row : row + 1, :length] for row, length in enumerate(lengths)]


def _ending_otherwise(row: Tensor) -> Tensor:
    """The row of ids [1,L] with another of its tokens at its end."""
    others = row[row != row[:, -1:]]
    changed = row.clone()
    changed[:, -1] = others[0] if others.numel() else row[0, -1] - 1
    return changed


def _relative(found: Tensor, wanted: Tensor, scale: float = 0.0) -> float:
    """The difference's length over that of `wanted` [...], or of as many values of `scale`."""
    size = max(float(wanted.float().norm()), scale * math.sqrt(wanted.numel()), 1e-30)
    return float((found - wanted).float().norm()) / size


def _strictest(outcome: Probe, device: torch.device) -> Probe:
    """`outcome` with what any rank found against chunks or packing. Collective."""
    found = [outcome.reason is not None, not outcome.packs, outcome.refusal is not None]
    worst = torch.tensor(found, dtype=torch.int32, device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    differs, padded, refused = worst.tolist()
    if refused and outcome.refusal is None:
        outcome = replace(outcome, refusal=_ELSEWHERE)
    if differs and outcome.reason is None:
        outcome = replace(outcome, reason=_ELSEWHERE)
    if padded and outcome.packs:
        outcome = replace(outcome, packs=False, packing_reason=_ELSEWHERE)
    return outcome
