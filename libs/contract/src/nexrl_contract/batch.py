"""The one check of a batch, by what its header says: gateway, ranks and mock refuse the same.
Values are the ranks' business."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from nexrl_contract.errors import ServiceError, argument_error
from nexrl_contract.losses import LOSSES
from nexrl_contract.operations import OPERATIONS, SCORED, SETTINGS, TOP_K, Operation
from nexrl_contract.sections import ActorConfig, RolloutCorrectionConfig
from nexrl_contract.tensors import TENSORS, Described, invalid_tensor, sizes_of

TENSOR_SECTION, VALUE_SECTION, METADATA_SECTION = (
    ("tensors", "batch"),
    ("values", "non_tensor_batch"),
    ("metadata", "meta_info"),
)
"""The names of a batch's three parts, ours and those of the field."""
_LOOKED_AT = 100
_NAMED_IGNORED = 32
_NAME_LENGTH = 64


@dataclass(frozen=True, slots=True)
class CheckedBatch:
    """A batch that the ranks may see: B, S and R, and which tensors the operation's loss reads
    besides text and masks."""

    rows: int
    sequence: int
    response: int
    names: tuple[str, ...]
    ignored: tuple[str, ...]
    """Tensors that the operation does not know, or that the loss does not look at."""


@dataclass(frozen=True, slots=True)
class Reads:
    """Tensors of a loss besides text and masks: without ``required`` it cannot be computed."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


def check_params(
    operation: Operation, given: Mapping[str, Any], beside: Sequence[str] = ()
) -> dict[str, Any]:
    """The operation's arguments with defaults; ``beside`` names what a request may hold besides.

    Raises INVALID_ARGUMENT naming the argument and the nearest known one.
    """
    try:
        return operation.params.model_validate(given).model_dump(mode="json")
    except ValidationError as error:
        known = [*operation.params.model_fields, *beside]
        raise argument_error(error.errors(), known) from None


def check_batch(
    tensors: Mapping[str, Described],
    operation: Operation,
    params: Mapping[str, Any],
    actor: ActorConfig | None,
) -> CheckedBatch:
    """Check what ``operation`` reads of a batch with this header, in a group of this configuration
    (None: not known).

    Raises INVALID_TENSOR naming tensor, expected and actual.
    """
    reads = reads_of(operation, params, actor, tensors)
    for name in dict.fromkeys((*operation.required, *reads.required)):
        if name not in tensors:
            raise _missing(operation, name, tensors)
    known = {name: tensors[name] for name in operation.reads if name in tensors}
    for name, tensor in known.items():
        TENSORS[name].check_dtype(tensor.dtype)
    rows, sequence, response = sizes_of(known)
    for name, tensor in known.items():
        if tensor.shape[:1] != (rows,):
            raise invalid_tensor(name, "shape", f"{rows} rows, as input_ids has", tensor.shape)
        TENSORS[name].check_shape(tensor.shape, rows, sequence, response)
    _check_one_k(known)
    names = tuple(
        name for name in dict.fromkeys((*reads.required, *reads.optional)) if name in known
    )
    looked_at = known.keys() if actor is None else {*(known.keys() & {*SCORED}), *names}
    return CheckedBatch(
        rows, sequence, response, names, tuple(name for name in tensors if name not in looked_at)
    )


def reads_of(
    operation: Operation,
    params: Mapping[str, Any],
    actor: ActorConfig | None,
    given: Collection[str],
) -> Reads:
    """What the loss of this operation reads of a batch that holds ``given``."""
    if operation.learns is None:
        return Reads()
    if operation.learns == "values":
        own = [name for name in operation.reads if name not in SCORED]
        required = tuple(name for name in own if name in operation.required)
        return Reads(required, tuple(name for name in own if name not in required))
    if operation.learns == "distillation":
        return _of_distillation(params, actor)
    name = params.get("loss") or (actor.policy_loss if actor is not None else None)
    if name is None:
        return Reads()
    loss, corrects = LOSSES[name], actor.rollout_correction if actor is not None else None
    required = ("loss_weights",) if loss.weights else ()
    optional: tuple[str, ...] = _of_kl(actor)
    if loss.advantages:
        required += ("advantages", *_of_correction(corrects))
        compared = (
            loss.ratio or "rollout_log_probs" in given
        )  # with the sampler's, for the metrics of a mismatch
        optional += ("rollout_log_probs", "old_log_probs") if compared else ("rollout_log_probs",)
    return Reads(required, optional)


def answers_of(
    operation: Operation, params: Mapping[str, Any], actor: ActorConfig | None
) -> tuple[str, ...]:
    """The tensors that the operation answers with, for these arguments and this configuration."""
    name = params.get("loss") or (actor.policy_loss if actor is not None else None)
    weighs = name is not None and LOSSES[name].weights
    absent = {*(() if params.get("top_k") else TOP_K), *(() if weighs else ("log_probs",))}
    return tuple(name for name in operation.answers if name not in absent)


def unread_metadata(operation: str, metadata: Mapping[str, Any]) -> list[str]:
    """Keys of a batch's metadata that seem meant to change what is computed, and do nothing in this
    operation.

    Those that another operation alone reads, and names close to one that is read. Trainers send
    many others.
    """
    read = {"temperature", *OPERATIONS[operation].settings}
    return [
        name
        for name in itertools.islice(metadata, _LOOKED_AT)
        if name not in read and _seems_meant(name)
    ]


def shortened(names: Sequence[str]) -> list[str]:
    """The names as a record may hold them: sorted, none long, not too many."""
    known = sorted({name[:_NAME_LENGTH] for name in names})
    more = len(known) - _NAMED_IGNORED
    return known if more <= 0 else [*known[:_NAMED_IGNORED], f"and {more} more"]


def _of_distillation(params: Mapping[str, Any], actor: ActorConfig | None) -> Reads:
    """Candidates, or the teacher's log-probabilities as a policy gradient, whose advantages and
    ratio may be sent too."""
    kind = params.get("distillation_loss") or (
        actor.distillation_loss if actor is not None else "policy_gradient"
    )
    if kind != "policy_gradient":
        return Reads(TOP_K, _of_kl(actor))
    student = actor.distillation_student if actor is not None else "current"
    corrects = _of_correction(actor.rollout_correction) if actor is not None else ()
    required = ("teacher_log_probs", *corrects, *(() if student == "current" else (student,)))
    return Reads(required, ("advantages", "rollout_log_probs", "old_log_probs", *_of_kl(actor)))


def _of_correction(correction: RolloutCorrectionConfig | None) -> tuple[str, ...]:
    """Which tokens it drops must be known before any log-probability is."""
    if correction is None:
        return ()
    if correction.drops:
        return ("rollout_log_probs", "old_log_probs")
    return ("rollout_log_probs",)


def _of_kl(actor: ActorConfig | None) -> tuple[str, ...]:
    if actor is None or not (actor.use_kl_loss and actor.kl_loss_coef):
        return ()
    return ("ref_log_prob", "old_log_probs") if actor.use_bias_correction_kl else ("ref_log_prob",)


def _check_one_k(known: Mapping[str, Described]) -> None:
    """Both of a teacher's tensors have the same K."""
    given = [name for name in TOP_K if name in known]
    if len({known[name].shape for name in given}) > 1:
        first, second = given
        expected = f"{list(known[second].shape)}, as {second} has"
        raise invalid_tensor(first, "shape", expected, known[first].shape)


def _missing(operation: Operation, name: str, tensors: Collection[str]) -> ServiceError:
    given = ", ".join(sorted(tensors)[:20]) or "none"
    return ServiceError(
        "INVALID_TENSOR",
        f"{operation.name} needs the tensor {name}; the batch has {given}",
        tensor=name,
        expected="present",
        actual="missing",
    )


def _seems_meant(name: str) -> bool:
    short = name[:60].lower()
    within = any(word in short or (len(short) > 3 and word.startswith(short)) for word in SETTINGS)
    return within or bool(difflib.get_close_matches(short, SETTINGS, n=1, cutoff=0.75))
