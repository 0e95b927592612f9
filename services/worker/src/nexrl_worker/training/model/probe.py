"""Finds out at `init_model` whether a family may be computed in chunks of its head, and packed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nexrl_worker.training.batch.micro_batch import MicroBatch
from nexrl_worker.training.batch.packing import narrowed_windows, unlike_configured, use_attention
from nexrl_worker.training.batch.tiny import TinyRows
from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.fsdp2 import forget_kept_back, release
from nexrl_worker.training.model.policy import PolicyModel
from nexrl_worker.training.model.value_head import RewardModel, ValueModel, padding_id
from nexrl_worker.training.model.wrapper import ModelWrapper, taken


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
    packed_difference: float = float("nan")
    packing_reason: str | None = None
    refusal: str | None = None

    def check(self) -> None:
        """Raise InvalidValue if no way is right."""
        if self.refusal is not None:
            raise InvalidValue(self.refusal)


_ELSEWHERE = "another rank found a difference"
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


def probed(
    model: ModelWrapper, device: torch.device, dtype: torch.dtype, packing: bool = False
) -> Probe:
    """As `probe`, then a tiny backward where the model trains.

    Errors are the family's and a refusal like another: all ranks meet them in step.
    """
    failing = "be tried out"
    try:
        outcome = probe(model, device, dtype, packing)
        if outcome.refusal is None and any(param.requires_grad for param in model.parameters()):
            failing = "be trained"
            _go_backward(model, outcome, device)
        return outcome
    except (MemoryError, torch.OutOfMemoryError, dist.DistError):  # this rank's alone
        raise
    except Exception as error:
        name = type(model.hf).__name__
        return Probe(
            float("nan"),
            None,
            refusal=f"{name} cannot {failing}: {type(error).__name__}: {error}"[:300],
        )


def _go_backward(model: ModelWrapper, outcome: Probe, device: torch.device) -> None:
    """One forward and backward as training runs them; no gradient stays. Collective."""
    micro = _tiny(model.vocabulary, device, packed=outcome.packs)
    try:
        if isinstance(model, PolicyModel):
            model.fallback, known = outcome.reason, model.fallback
            try:
                answers = torch.stack(model.score(micro, entropy=True, all_labels=True))
            finally:
                model.fallback = known
        else:
            answers = cast(ValueModel, model).values(micro)
        answers.sum().backward()  # type: ignore[no-untyped-call]
    finally:
        model.zero_grad()
        forget_kept_back(model)
        release(model)


@torch.no_grad()
def probe(
    model: ModelWrapper, device: torch.device, dtype: torch.dtype, packing: bool = False
) -> Probe:
    """Compare each way with the model's own on a tiny input. Collective; leaves no gathered weights
    behind.

    A language model's hidden states are scaled up until the logits reach 50: a fresh model's small
    ones would hide a soft cap. Sets nothing: the caller stores `reason` as the policy's `fallback`.
    """
    try:
        use_attention(model.hf, model.own_attention)
        if isinstance(model, PolicyModel):
            return _probe_scorer(model, device, dtype, packing)
        outcome = Probe(float("nan"), None)
        if isinstance(model, RewardModel):
            outcome = _probe_rewards(model, device, dtype)
        elif isinstance(model, ValueModel):
            outcome = _probe_values(model, device, dtype)
        if outcome.reason is not None and packing:
            return replace(outcome, packing_reason=outcome.reason)
        scale = float(
            _attempt(model, _tiny(model.vocabulary, device, packed=False), []).abs().max()
        )
        return _with_packing(outcome, model, device, dtype, packing, max(scale, 1e-6))
    finally:
        release(model)


def _probe_scorer(
    policy: PolicyModel, device: torch.device, dtype: torch.dtype, packing: bool
) -> Probe:
    refusal = _misread(policy, device, dtype)
    if refusal is not None:
        return Probe(float("nan"), policy.fallback, refusal=refusal[:300])
    micro = _tiny(policy.vocabulary, device, packed=False)
    known, policy.fallback = policy.fallback, "probe"
    captured: list[Tensor] = []
    watch = policy.hf.register_forward_hook(
        lambda module, args, output: captured.append(output.logits)
    )
    _scores(policy, micro)
    watch.remove()
    try:
        with _enlarged(policy, _PEAK / max(float(captured[0].abs().max()), 1e-6)):
            own = _scores(policy, micro)  # the family's own logits: fallback is still set
            policy.fallback = known
            outcome = Probe(float("nan"), known)
            if known is None:
                failures: list[str] = []
                found = _caught(policy, lambda: policy.hidden(micro, micro.index), failures)
                if failures or found.shape[1:] != policy.head_inputs:
                    why = failures[0] if failures else "they are not what its head takes"
                    outcome = Probe(
                        float("nan"), f"the family does not give its hidden states: {why}"[:300]
                    )
                else:
                    outcome = _compare_chunked(
                        float((own - _scores(policy, micro)).abs().max()), dtype
                    )
            policy.fallback = outcome.reason
            return _with_packing(outcome, policy, device, dtype, packing, _PEAK)
    finally:
        policy.fallback = known


def _misread(policy: PolicyModel, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why log-probabilities would be wrong: our rows beside one another against each alone.

    The last token is only asked for, so a model whose earlier answers change with it has read
    ahead.
    """
    hf: Any = policy.hf
    micro = _plain(hf, device)
    failures: list[str] = []

    def logits(row: Tensor) -> Tensor:
        answer: Tensor = hf(input_ids=row, **taken(hf, use_cache=False)).logits
        return answer[0] + 0.0  # a new tensor, as FSDP needs

    def beside() -> Tensor:
        answers: Tensor = policy.outputs(micro, whole=True).logits
        return answers.flatten(0, 1)[micro.index]

    alone = [_caught(policy, partial(logits, row), failures) for row in _alone(micro)]
    other = [
        _caught(policy, partial(logits, _ending_otherwise(row)), failures) for row in _alone(micro)
    ]
    found = _caught(policy, beside, failures)
    name = type(hf).__name__
    if failures:
        return f"{name} cannot answer a row of text: {failures[0]}"
    truth, tolerance = torch.cat([row[:-1] for row in alone]), _tolerance(hf, dtype)
    if _relative(torch.cat([row[:-1] for row in other]), truth) > tolerance:
        return (
            f"{name} reads a row in both directions, so what it says of a token would know the "
            "token"
        )
    difference = _relative(found, truth)
    if difference > tolerance:
        return (
            f"{name} answers rows beside others otherwise than each alone: by {difference:.2g} of "
            "their size"
        )
    return None


def _ending_otherwise(row: Tensor) -> Tensor:
    """The row of ids [1,L] with another of its tokens at its end."""
    others = row[row != row[:, -1:]]
    changed = row.clone()
    changed[:, -1] = others[0] if others.numel() else row[0, -1] - 1
    return changed


def _probe_rewards(model: RewardModel, device: torch.device, dtype: torch.dtype) -> Probe:
    """Rows beside one another against each alone and as it comes: what a user of transformers
    sees."""
    micro = _plain(model.hf, device)
    failures: list[str] = []
    with _terms(model.hf) as terms:
        alone = [_caught(model, partial(model.own, row, None), failures) for row in _alone(micro)]
    name, known = type(model.hf).__name__, model.fallback
    if failures:
        return Probe(
            float("nan"), known, refusal=f"{name} cannot answer a row: {failures[0]}"[:300]
        )
    truth = torch.cat(alone)
    try:
        difference = float("nan")
        if known is None:
            difference = _relative(
                _caught(model, lambda: model.answers(micro), failures), truth, max(terms)
            )
            if not failures and difference <= _tolerance(model.hf, dtype):
                return Probe(difference, None)
        reason = known or (
            f"the model's own answers differ from its linear head by {difference:.2g} (a "
            "layer between)"
        )
        model.fallback, failures = reason, []
        own = _relative(_caught(model, lambda: model.answers(micro), failures), truth, max(terms))
    finally:
        model.fallback = known
    if not failures and own <= _tolerance(model.hf, dtype):
        return Probe(difference, reason)
    why = failures[0] if failures else f"by {own:.2g} of their size"
    return Probe(
        difference,
        reason,
        refusal=f"{name} answers rows beside others otherwise than each alone: {why}"[:300],
    )


def _probe_values(model: ValueModel, device: torch.device, dtype: torch.dtype) -> Probe:
    """Hidden states of rows beside one another, at our positions, against each alone and as it
    comes."""
    micro = _plain(model.hf, device)
    failures: list[str] = []

    def hidden(row: Tensor) -> Tensor:
        base: Any = model.hf.base_model
        states: Tensor = base(input_ids=row, **taken(base, use_cache=False)).last_hidden_state
        return states[0, :-1] + 0.0  # a new tensor, as FSDP needs

    alone = [_caught(model, partial(hidden, row), failures) for row in _alone(micro)]
    found = _caught(model, lambda: model.hidden(micro, micro.index), failures)
    name = type(model.hf).__name__
    if failures:
        return Probe(
            float("nan"), None, refusal=f"no critic can be made of {name}: {failures[0]}"[:300]
        )
    difference = _relative(found, torch.cat(alone))
    if difference <= _tolerance(model.hf, dtype):
        return Probe(difference, None)
    refusal = (
        f"no critic can be made of {name}: rows beside others differ from each alone by "
        f"{difference:.2g}"
    )
    return Probe(difference, None, refusal=refusal)


def _plain(hf: nn.Module, device: torch.device) -> MicroBatch:
    """Rows of ordinary tokens, one of which ends in the padding id where there is one."""
    config: Any = hf.config.get_text_config()  # type: ignore[union-attr, operator]
    said = {**hf.config.to_dict(), **config.to_dict()}  # type: ignore[union-attr, operator]
    special = {
        value for key, value in said.items() if key.endswith(_SPECIAL) and isinstance(value, int)
    }
    return TinyRows(config.vocab_size, _LENGTHS, special, padding_id(hf)).micro_batch(device)


def _alone(micro: MicroBatch) -> list[Tensor]:
    """The rows' ids [1,L] without padding."""
    assert micro.attention_mask is not None
    lengths = micro.attention_mask.sum(dim=1).tolist()
    return [micro.input_ids[row : row + 1, :length] for row, length in enumerate(lengths)]


@contextmanager
def _terms(hf: nn.Module) -> Iterator[list[float]]:
    """The length of the products that heads of one output sum up inside the block: rounding goes by
    it.

    A sum may be near 0 where they cancel, and then says nothing of what a difference means.
    """
    found = [0.0]

    def note(head: Any, args: tuple[Tensor, ...]) -> None:
        found.append(float((args[0] * head.weight).float().norm(dim=-1).max()))

    heads = [
        part for part in hf.modules() if isinstance(part, nn.Linear) and part.out_features == 1
    ]
    hooks = [head.register_forward_pre_hook(note) for head in heads]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _relative(found: Tensor, wanted: Tensor, scale: float = 0.0) -> float:
    """The difference's length over that of `wanted`, or of as many values of `scale`."""
    size = max(float(wanted.float().norm()), scale * math.sqrt(wanted.numel()), 1e-30)
    return float((found - wanted).float().norm()) / size


def _tolerance(hf: nn.Module, dtype: torch.dtype) -> float:
    config: Any = hf.config.get_text_config()  # type: ignore[union-attr, operator]
    routed = any("expert" in key and value for key, value in config.to_dict().items())
    return _PACKED_TOLERANCE.get(
        dtype, _EXPERTS_TOLERANCE_HALF if routed else _PACKED_TOLERANCE_HALF
    )


def _caught(model: ModelWrapper, read: Callable[[], Tensor], failures: list[str]) -> Tensor:
    """What `read` gives inside the model's forward; what a family raises there goes to `failures`.

    FSDP does not put a model back that was left by an exception.
    """

    def attempt() -> Tensor:
        try:
            return read()
        # What a family makes of an argument that it does not know is its own affair.
        except Exception as error:
            failures.append(str(error) or type(error).__name__)
            return torch.zeros(())

    answer: Tensor = model(attempt)
    return answer


def _compare_chunked(difference: float, dtype: torch.dtype) -> Probe:
    if difference <= _TOLERANCE.get(dtype, 1e-2) * _PEAK:
        return Probe(difference, None)
    reason = (
        f"the model's own logits differ from its linear head by {difference:.2g} (scaled or "
        "capped logits)"
    )
    return Probe(difference, reason)


def _with_packing(
    outcome: Probe,
    model: ModelWrapper,
    device: torch.device,
    dtype: torch.dtype,
    packing: bool,
    scale: float,
) -> Probe:
    """`outcome` with what packing does to log-probabilities (to hidden states, where the model has
    no vocabulary)."""
    if not packing:
        return outcome
    packed = _tiny(model.vocabulary, device, packed=True)
    assert packed.segments is not None
    failures: list[str] = []
    micros = (_tiny(model.vocabulary, device, packed=False), packed)
    with narrowed_windows(model.hf, _WINDOW):
        own, found = (_attempt(model, micro, failures) for micro in micros)
        difference = float("nan") if failures else float((own - found).abs().max())
        if failures:
            reason: str | None = f"the model cannot run packed: {failures[0]}"[:300]
        else:
            reason = unlike_configured(model.hf, packed.segments)
    if (
        reason is None
        and not difference <= _PACKED_TOLERANCE.get(dtype, _PACKED_TOLERANCE_HALF) * scale
    ):
        reason = f"packed rows differ from padded ones by {difference:.2g}"
    return Probe(outcome.difference, outcome.reason, reason is None, difference, reason)


def _attempt(model: ModelWrapper, micro: MicroBatch, failures: list[str]) -> Tensor:
    """Log-probabilities in the way that `fallback` says, or hidden states; what a family raises
    goes to `failures`."""

    def read() -> Tensor:
        if not isinstance(model, PolicyModel):
            return model.hidden(micro, micro.index)
        if model.fallback is None:
            weight, bias = model.head()
            logits = F.linear(model.hidden(micro, micro.index).to(weight.dtype), weight, bias)
        else:
            logits = model.outputs(micro, whole=True).logits.flatten(0, 1)[micro.index]
        return torch.log_softmax(logits, dim=-1).gather(1, micro.labels[:, None]).sum(dim=1)

    return _caught(model, read, failures)


def _scores(policy: PolicyModel, micro: MicroBatch) -> Tensor:
    return policy.score(micro, entropy=False, all_labels=True)[0]


@contextmanager
def _enlarged(policy: PolicyModel, scale: float) -> Iterator[None]:
    def enlarge(module: nn.Module, args: object, output: object) -> object:
        output.last_hidden_state = output.last_hidden_state * scale  # type: ignore[attr-defined]
        return output

    if not policy.has_body:
        yield
        return
    hook = policy.hf.base_model.register_forward_hook(enlarge)  # type: ignore[union-attr]
    try:
        yield
    finally:
        hook.remove()


def _tiny(vocabulary: int, device: torch.device, packed: bool) -> MicroBatch:
    return TinyRows(vocabulary, _LENGTHS).micro_batch(device, packed)


def strictest(outcome: Probe, device: torch.device) -> Probe:
    """`outcome` with what any rank found against chunks or packing: ranks must compute alike.
    Collective."""
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
