"""The tensors that operations read and answer with: what each means, its shapes and its dtypes.

Shapes: B rows; S columns of ``input_ids``; R columns of ``responses`` (S - 1 without them), the
last R of the S; K tokens of a vocabulary at each of the R.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from nexrl_contract.errors import ServiceError

INTEGERS = frozenset({"I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64"})
FLOATS = frozenset({"F64", "F32", "BF16", "F16"})
_KINDS = {
    "integers": INTEGERS,
    "integers, bools or floats": INTEGERS | FLOATS | {"BOOL"},
    "numbers": INTEGERS | FLOATS,
}

B, BS, BR, BRK = "[B]", "[B,S]", "[B,R]", "[B,R,K]"


class Described(Protocol):
    """A tensor's dtype code and shape: an entry of a frame's header, or a RawTensor."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One row of :data:`TENSORS`: any of ``shapes`` may be sent."""

    name: str
    meaning: str
    shapes: tuple[str, ...] = (BS, BR)
    values: str = "numbers"
    """What its elements are: "integers", "integers, bools or floats" or "numbers"."""

    @property
    def answered(self) -> str:
        """Its shape in an answer."""
        return BR if BR in self.shapes else self.shapes[0]

    def check_dtype(self, dtype: str) -> None:
        """Raise INVALID_TENSOR unless elements of that dtype can be what they mean."""
        allowed = _KINDS[self.values]
        if dtype not in allowed:
            raise invalid_tensor(
                self.name, "dtype", f"{self.values} ({', '.join(sorted(allowed))})", dtype
            )

    def check_shape(self, shape: tuple[int, ...], rows: int, sequence: int, response: int) -> None:
        """Raise INVALID_TENSOR unless the shape is one of its own in a batch of B, S and R."""
        sizes = {"B": rows, "S": sequence, "R": response}
        if not any(_fits(shape, form, sizes) for form in self.shapes):
            forms = " or ".join(_with_sizes(form, sizes) for form in self.shapes)
            raise invalid_tensor(self.name, "shape", forms, shape)


TENSORS: dict[str, TensorSpec] = {
    spec.name: spec
    for spec in (
        TensorSpec("input_ids", "Tokens of prompt and response", (BS,), "integers"),
        TensorSpec(
            "attention_mask", "1 where a token is no padding", (BS,), "integers, bools or floats"
        ),
        TensorSpec("position_ids", "Positions, from 0 in each row unless given", (BS,), "integers"),
        TensorSpec("responses", "The last R columns of input_ids", (BR,), "integers"),
        TensorSpec(
            "loss_mask", "1 where a token is learned from", values="integers, bools or floats"
        ),
        TensorSpec(
            "scoring_attention_mask", "In place of both masks", values="integers, bools or floats"
        ),
        TensorSpec("temperature", "Divides the logits of a row", (B,)),
        TensorSpec("advantages", "Of each token, or of each row", (BS, BR, B)),
        TensorSpec("loss_weights", "The client's dL/dlog_prob, of the linear loss", (BS, BR, B)),
        TensorSpec("old_log_probs", "Of the weights before the first of this batch's updates"),
        TensorSpec("rollout_log_probs", "Of the sampler"),
        TensorSpec("ref_log_prob", "Of the reference weights"),
        TensorSpec("teacher_log_probs", "Of the teacher, at the sampled tokens"),
        TensorSpec("teacher_topk_ids", "The teacher's likeliest tokens", (BRK,), "integers"),
        TensorSpec("teacher_topk_log_probs", "Their log-probabilities", (BRK,)),
        TensorSpec("values", "The critic's, of the position before a token"),
        TensorSpec("returns", "What values learn"),
        TensorSpec("rewards", "A reward model's, of a row", (B,)),
        TensorSpec("log_probs", "Of the current weights, for the linear loss"),
    )
}

MASKS = tuple(name for name, spec in TENSORS.items() if "bools" in spec.values)
"""Tensors of which only zero or not counts."""


def sizes_of(tensors: Mapping[str, Described]) -> tuple[int, int, int]:
    """B, S and R of a batch with ``input_ids``; raises INVALID_TENSOR where its shape or that of
    ``responses`` is none."""
    shape = tensors["input_ids"].shape
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 2:
        raise invalid_tensor(
            "input_ids", "shape", "[B,S] with B at least 1 and S at least 2", shape
        )
    rows, sequence = shape
    if "responses" not in tensors:
        return rows, sequence, sequence - 1
    answer = tensors["responses"].shape
    if len(answer) != 2 or not 1 <= answer[1] < sequence:
        raise invalid_tensor(
            "responses", "shape", f"[{rows},R] with R from 1 to {sequence - 1}", answer
        )
    return rows, sequence, answer[1]


def invalid_tensor(
    name: str, what: str, expected: str, actual: str | tuple[int, ...]
) -> ServiceError:
    """INVALID_TENSOR for a dtype or shape."""
    text = actual if isinstance(actual, str) else str(list(actual))
    return ServiceError(
        "INVALID_TENSOR",
        f"{name} has {what} {text}; expected {expected}",
        tensor=name,
        expected=expected,
        actual=text,
    )


def _fits(shape: tuple[int, ...], form: str, sizes: Mapping[str, int]) -> bool:
    letters = form[1:-1].split(",")
    if len(shape) != len(letters):
        return False
    return all(
        size == sizes.get(letter, max(size, 1)) for size, letter in zip(shape, letters, strict=True)
    )


def _with_sizes(form: str, sizes: Mapping[str, int]) -> str:
    named = ",".join(str(sizes.get(letter, letter)) for letter in form[1:-1].split(","))
    return f"[{named}]" + (" with K at least 1" if "K" in form else "")
