"""What a request's headers ask for besides its content: one key per call, when to answer, and in
which form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Header
from nexrl_contract.errors import ServiceError
from nexrl_contract.names import FRAME_TYPE, KEY_PATTERN, valid_idempotency_key


@dataclass(frozen=True, slots=True)
class Preferences:
    """``respond_async`` answers 202 unless the job ends within ``wait_s``; ``frame`` prefers
    tensors in a frame."""

    key: str | None = None
    respond_async: bool = False
    wait_s: float = 0.0
    frame: bool = False


def read_preferences(
    idempotency_key: Annotated[
        str | None,
        Header(
            description=(
                "The same key and content again give the first job again; other content is refused."
            ),
            examples=["step-17-try"],
        ),
    ] = None,
    prefer: Annotated[
        str | None,
        Header(
            description=(
                "`respond-async` answers 202 at once; `respond-async, wait=S` after at most S "
                "seconds."
            )
        ),
    ] = None,
    accept: Annotated[
        str | None, Header(description=f"`{FRAME_TYPE}` gets result tensors as a binary frame.")
    ] = None,
) -> Preferences:
    """A FastAPI dependency; raises INVALID_ARGUMENT for a bad key. Unknown preferences are ignored
    (RFC 7240)."""
    if idempotency_key is not None and not valid_idempotency_key(idempotency_key):
        raise ServiceError(
            "INVALID_ARGUMENT", f"Idempotency-Key must match {KEY_PATTERN}", key="Idempotency-Key"
        )
    preferences = dict(_preference(part) for part in (prefer or "").split(","))
    return Preferences(
        key=idempotency_key,
        respond_async="respond-async" in preferences,
        wait_s=_seconds(preferences.get("wait", "")),
        frame=FRAME_TYPE in (accept or "").lower(),
    )


def _preference(part: str) -> tuple[str, str]:
    name, _, value = part.partition("=")
    return name.strip().lower(), value.strip().strip('"')


def _seconds(text: str) -> float:
    return float(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0.0
