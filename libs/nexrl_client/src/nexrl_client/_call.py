"""One call of an operation, made ready to be sent: its path, its parameters, its frame."""

from __future__ import annotations

import difflib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import tensor_codec
from nexrl_contract.envelope import Envelope
from nexrl_contract.operations import INITIALIZE, OPERATIONS
from tensor_codec import Encoded

from ._batch import Content, json_object, normalise
from ._body import Part, cut
from ._service_config import setup_params
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
        raise UnknownOperation(f"there is no operation {operation!r}{_did_you_mean(operation)}")
    given = setup_params(identifier, config, **params) if operation == INITIALIZE else params
    sent = json_object(given, "argument")
    if not kind.takes_batch:
        _refuse_batch(operation, batch)
        return Call(operation, sent)
    if batch is None:
        raise InvalidBatch(f"{operation} needs a batch")
    normal = normalise(batch, kind)
    return Call(operation, sent, normal, encode(normal, sent))


def encode(batch: Content, params: Mapping[str, Any]) -> Encoded:
    """The request frame: a header, and views of the tensors. Raises InvalidBatch."""
    ready()
    try:
        return tensor_codec.encode(
            batch.tensors, Envelope(batch.metadata, dict(params)).frame_metadata()
        )
    except tensor_codec.CodecError as error:
        raise InvalidBatch(str(error)) from error


def split_for_requests(request: object, max_size: int = MAX_REQUEST_BYTES) -> list[Part]:
    """Cut an encoded frame, bytes, or a batch (its frame, with every tensor) into parts of at most
    max_size bytes.

    A part views the tensors' memory: iterate it for its bytes, len() is their number. Joined in
    order the parts are one frame, and one operation. Raises ClientError for a size below 1,
    InvalidBatch for what cannot be encoded.
    """
    if max_size < 1:
        raise ClientError(f"max_size is {max_size}; give the bytes of the largest part, 1 or more")
    if isinstance(request, Encoded):
        return cut(list(request), max_size)
    if isinstance(request, bytes | bytearray | memoryview):
        return cut([memoryview(request)], max_size)
    return cut(list(encode(normalise(request, None), {})), max_size)


def _refuse_batch(operation: str, batch: object) -> None:
    if batch is not None:
        raise InvalidBatch(f"{operation} takes no batch; give its arguments by name")


def _did_you_mean(word: str) -> str:
    close = difflib.get_close_matches(word, OPERATIONS, n=1)
    return (
        f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(OPERATIONS))}"
    )
