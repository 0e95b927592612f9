"""Strict JSON in bounded time: depth, marks and escapes are limited, and long texts never reach the
parser.

``json.loads`` keeps the interpreter to itself until it is done, in a thread too. So what would keep
it long is refused or cut out before: a million small lists by counting, tens of megabytes of base64
by position.
"""

from __future__ import annotations

import json
import math
import secrets
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn

from nexrl_contract.errors import ServiceError

JSON = dict[str, Any]
"""A JSON object."""
MAX_DEPTH = 64
MAX_MARKS = 100_000
"""Lists, objects, commas and texts together."""
MAX_ESCAPES = 400_000
MAX_DIGITS = 100
LONG_TEXT_BYTES = 64 * 1024
"""A text of so many bytes, without escapes, is cut out."""
_WINDOW = 64 * 1024
_BACKSLASH = ord("\\")


def parse_object(
    raw: bytes | bytearray, what: str = "the body", constant: Callable[[str], Any] | None = None
) -> JSON:
    """The JSON object in ``raw``, which is UTF-8; raises MALFORMED. ``constant`` reads NaN and the
    infinities, if they may be."""
    try:
        skeleton, texts = _cut_out(raw)
        document = json.loads(
            skeleton.decode("utf-8-sig"),
            object_pairs_hook=_unique,
            parse_constant=constant or _refuse_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
        if not isinstance(document, dict):
            raise ServiceError(
                "MALFORMED", f"{what} must be a JSON object, not {type(document).__name__}"
            )
        _restore(document, texts, surrogates=b"\\ud" in skeleton or b"\\uD" in skeleton)
    except UnicodeEncodeError:
        raise ServiceError(
            "MALFORMED", f"{what} has half a surrogate pair, which is no text"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ServiceError("MALFORMED", f"{what} is not JSON: {str(error)[:200]}") from None
    return document


def _cut_out(raw: bytes | bytearray) -> tuple[bytearray, dict[str, str]]:
    """``raw`` with a short name for each long text, and these by name; raises ValueError where a
    limit is exceeded."""
    _count(raw, 0, len(raw), b"\\", 0, MAX_ESCAPES, "escapes in its texts")
    token, texts = secrets.token_hex(8), dict[str, str]()
    skeleton, marks, at = bytearray(), 0, 0
    while (start := raw.find(b'"', at)) >= 0:
        marks = 1 + _count(raw, at, start, b"[{,", marks, MAX_MARKS, "lists, objects and values")
        end = _closing(raw, start)
        if end - start > LONG_TEXT_BYTES and raw.find(b"\\", start, end) < 0:
            name = f"{token}{len(texts)}"
            texts[name] = str(memoryview(raw)[start + 1 : end], "utf-8")
            skeleton += raw[at:start] + f'"{name}"'.encode()
        else:
            skeleton += raw[at : end + 1]
        at = end + 1
    _count(raw, at, len(raw), b"[{,", marks, MAX_MARKS, "lists, objects and values")
    return skeleton + raw[at:], texts


def _count(
    raw: bytes | bytearray, start: int, end: int, marks: bytes, so_far: int, most: int, what: str
) -> int:
    """``so_far`` and how often any of ``marks`` stands in a part of ``raw``; raises ValueError as
    soon as that is too often."""
    for at in range(start, end, _WINDOW):
        so_far += sum(raw.count(mark, at, min(at + _WINDOW, end)) for mark in marks)
        if so_far > most:
            raise ValueError(
                f"it has more than {most} {what}; send tensors as base64 or as a frame"
            )
    return so_far


def _closing(raw: bytes | bytearray, start: int) -> int:
    """Where the text ends whose first quote is at ``start``."""
    end = start
    while (end := raw.find(b'"', end + 1)) >= 0:
        before = end - 1
        while raw[before] == _BACKSLASH:
            before -= 1
        if (end - before) % 2:
            return end
    raise ValueError(f"the text that begins at byte {start} does not end")


def _restore(document: JSON, texts: dict[str, str], *, surrogates: bool) -> None:
    """Put the long texts back; raises ValueError for what is too deep, or no text. Not recursive,
    as what it looks for is."""
    level: list[Any] = [document]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for outer in level:
            for key, value in outer.items() if isinstance(outer, dict) else enumerate(outer):
                if isinstance(value, dict | list):
                    inner.append(value)
                elif isinstance(value, str) and value in texts:
                    outer[key] = texts[value]
                if key in texts:
                    raise ValueError(f"a key has more than {LONG_TEXT_BYTES} bytes")
                if surrogates:
                    f"{key}{value if isinstance(value, str) else ''}".encode()
        level = inner
    if level:
        raise ValueError(f"it is nested in more than {MAX_DEPTH} levels")


def _unique(pairs: list[tuple[str, Any]]) -> JSON:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {twice[:100]!a} stands twice in one object")
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f'{text} is not JSON; write the string "{text}"')


def _finite(text: str) -> float:
    if len(text) > MAX_DIGITS or not math.isfinite(number := float(text)):
        raise ValueError(f"the number {_shown(text)} is too large or too long")
    return number


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"the number {_shown(text)} is too large or too long")
    return int(text)


def _shown(text: str) -> str:
    return text if len(text) < 30 else f"{text[:20]}... ({len(text)} characters)"


def json_bytes(content: Any) -> bytes:
    """Compact JSON; NaN and the infinities become "NaN", "Infinity" and "-Infinity"."""
    return json.dumps(finite(content), separators=(",", ":"), allow_nan=False).encode()


def finite(value: Any) -> Any:
    """``value`` with its non-finite floats as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {str(name): finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value
