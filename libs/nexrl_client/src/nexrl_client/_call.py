"""One call of an operation, ready to be sent: its path, its parameters, its frame and its parts."""

from __future__ import annotations

import difflib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import tensor_codec
import xxhash
from nexrl_contract.envelope import Envelope
from nexrl_contract.operations import INITIALIZE, OPERATIONS
from tensor_codec import Encoded

from ._config import setup_params
from ._content import Content, json_object, normalise
from ._tensors import ready
from .errors import ClientError, InvalidBatch, UnknownOperation

MAX_REQUEST_BYTES = 100 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Call:
    """frame is None for operations without a batch; key makes repeating the call harmless."""

    operation: str
    params: dict[str, Any]
    batch: Content | None = None
    frame: Encoded | None = None
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def path(self) -> str:
        """Where the call is posted."""
        return OPERATIONS[self.operation].path

    @property
    def ignored(self) -> tuple[str, ...]:
        """What of the caller's batch does not travel."""
        return self.batch.ignored if self.batch else ()


def prepare(
    operation: str,
    batch: object,
    params: Mapping[str, Any],
    identifier: str | None,
    config: Mapping[str, Any] | None = None,
) -> Call:
    """Check what can be checked without the service, and encode; config is the client's own entry,
    if it has one.

    Raises subclasses of ClientError.
    """
    kind = OPERATIONS.get(operation)
    if kind is None:
        close = difflib.get_close_matches(operation, OPERATIONS, n=1)
        known = f"known are {', '.join(sorted(OPERATIONS))}"
        hint = f"did you mean {close[0]!r}?" if close else known
        raise UnknownOperation(f"there is no operation {operation!r}; {hint}")
    given = setup_params(identifier, config, **params) if operation == INITIALIZE else params
    sent = json_object(given, "argument")
    if not kind.takes_batch:
        if batch is not None:
            raise InvalidBatch(f"{operation} takes no batch; give its arguments by name")
        return Call(operation, sent)
    if batch is None:
        raise InvalidBatch(f"{operation} needs a batch")
    content = normalise(batch, kind)
    return Call(operation, sent, content, _encode(content, sent))


def _encode(content: Content, params: Mapping[str, Any]) -> Encoded:
    """The request frame: a header, and views of the tensors. Raises InvalidBatch."""
    ready()
    beside = Envelope(content.metadata, dict(params)).frame_metadata()
    try:
        return tensor_codec.encode(content.tensors, beside)
    except tensor_codec.CodecError as error:
        raise InvalidBatch(str(error)) from error


class Part:
    """Some consecutive bytes of a frame, as views of it: iterating yields them, len() is their
    bytes."""

    def __init__(self, views: Sequence[memoryview]) -> None:
        self.views = tuple(views)

    def __len__(self) -> int:
        return sum(view.nbytes for view in self.views)

    def __iter__(self) -> Iterator[memoryview]:
        return iter(self.views)

    def checksum(self) -> str:
        """xxh3-128 of the bytes, in hex."""
        digest = xxhash.xxh3_128()
        for view in self.views:
            digest.update(view)
        return digest.hexdigest()


def split_for_requests(request: object, max_size: int = MAX_REQUEST_BYTES) -> list[Part]:
    """Cut a request into parts of at most max_size bytes.

    request is an encoded frame, bytes, or a batch, of which a frame with every tensor is made.
    Joined in order the parts are that frame, and one operation. A part views the tensors' memory.
    Raises ClientError for a size below 1, InvalidBatch for what cannot be encoded.
    """
    if max_size < 1:
        raise ClientError(f"max_size is {max_size}; give the bytes of the largest part, 1 or more")
    if isinstance(request, Encoded):
        return _cut(list(request), max_size)
    if isinstance(request, bytes | bytearray | memoryview):
        return _cut([memoryview(request)], max_size)
    return _cut(list(_encode(normalise(request, None), {})), max_size)


def _cut(views: Sequence[bytes | memoryview], max_size: int) -> list[Part]:
    """Parts of at most max_size bytes that make up the views in order; all but the last are
    full."""
    parts: list[Part] = []
    current: list[memoryview] = []
    room = max_size
    for view in (memoryview(view).cast("B") for view in views if len(view)):
        position = 0
        while position < view.nbytes:
            piece = view[position : position + room]
            current.append(piece)
            position += piece.nbytes
            room -= piece.nbytes
            if room == 0:
                parts.append(Part(current))
                current, room = [], max_size
    return [*parts, Part(current)] if current else parts
