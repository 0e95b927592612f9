"""The rules that both stores share: valid ids and parts, ages, and the refusals that callers
see."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from nexrl_contract.errors import ServiceError
from tensor_codec import CodecError

from .protocol import RESULT_SUFFIX, Chunk

MAX_PARTS = 100_000
_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,79}")
Known = TypeVar("Known")


def is_id(text: str) -> bool:
    """Whether ``text`` may name a payload."""
    return _ID.fullmatch(text) is not None


def check_id(payload_id: str) -> str:
    """Return the id, or raise INVALID_ARGUMENT: an id is a file's name, so it must not lead
    anywhere else."""
    if not is_id(payload_id):
        raise ServiceError(
            "INVALID_ARGUMENT",
            f"payload id {payload_id[:100]!a} is not valid: use 1 to 80 of A-Z a-z 0-9 _ . - "
            "without a leading dot",
        )
    return payload_id


def check_part(n: int) -> int:
    """Return the part's number, or raise INVALID_ARGUMENT."""
    if not 0 <= n < MAX_PARTS:
        raise ServiceError(
            "INVALID_ARGUMENT", f"part {n} is not between 0 and {MAX_PARTS - 1}", part=n
        )
    return n


def check_count(payload_id: str, present: Sequence[int], count: int) -> None:
    """Raise INVALID_ARGUMENT unless the parts present are exactly 0 to ``count - 1``."""
    if not 1 <= count <= MAX_PARTS:
        raise ServiceError(
            "INVALID_ARGUMENT", f"parts must be between 1 and {MAX_PARTS}, not {count}"
        )
    missing = sorted(set(range(count)) - set(present))
    if missing:
        named = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
        raise ServiceError(
            "INVALID_ARGUMENT",
            f"payload {payload_id} lacks part {named} of {count}: send it with PUT "
            f"/payloads/{payload_id}/parts/N",
            missing=missing[:20],
        )
    if len(present) > count:
        raise ServiceError(
            "INVALID_ARGUMENT",
            f"payload {payload_id} has {len(present)} parts, not {count}: say how many were sent",
        )


def check_same(payload_id: str, n: int, known: Known | None, sent: Known) -> None:
    """Hold a part that is sent again, or too late (``known`` is None), against the one that is
    there; raises INVALID_ARGUMENT."""
    if known is None:
        raise ServiceError(
            "INVALID_ARGUMENT",
            f"payload {payload_id} is put together already, without part {n}: use a new payload id",
        )
    if known != sent:
        raise ServiceError(
            "INVALID_ARGUMENT",
            f"part {n} of payload {payload_id} is already there with other bytes: use a new "
            "payload id",
            part=n,
        )


def not_found(payload_id: str) -> ServiceError:
    """The refusal for a payload that is not there."""
    return ServiceError(
        "PAYLOAD_NOT_FOUND",
        f"payload {payload_id} is not there: it was never sent, has expired or was deleted",
    )


def age_limit(payload_id: str, result_age_s: float, upload_age_s: float) -> float:
    """Seconds after which nobody needs the payload."""
    return result_age_s if payload_id.endswith(RESULT_SUFFIX) else upload_age_s


@contextmanager
def as_malformed(payload_id: str) -> Iterator[None]:
    """Turn the codec's refusals of a frame into MALFORMED."""
    try:
        yield
    except CodecError as error:
        raise ServiceError(
            "MALFORMED", f"payload {payload_id} is no sound frame: {error}"
        ) from error


def byte_views(chunks: Sequence[Chunk]) -> list[memoryview]:
    """The non-empty chunks as flat views of bytes."""
    return [memoryview(chunk).cast("B") for chunk in chunks if memoryview(chunk).nbytes]
