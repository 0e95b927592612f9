"""What a payload store is, whichever place it keeps its bytes in.

``FileStore`` keeps them in a folder, ``RedisStore`` in Redis. Every refusal is a ``ServiceError``.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TypeAlias

from nexrl_contract.errors import ServiceError
from tensor_codec import Header

if TYPE_CHECKING:
    import torch

Chunk: TypeAlias = bytes | bytearray | memoryview
Rows: TypeAlias = slice | Sequence[int] | None

RESULT_SUFFIX = ".result"
"""Payloads whose id ends so are results: they are swept by ``result_age_s``."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredPayload:
    """A payload that is there.

    ``checksum`` stands for the checksums of its blocks, which lie beside it: equal bytes that came
    in equal parts have equal ones, and whoever opens the payload with it reads these bytes or none.
    """

    id: str
    nbytes: int
    checksum: str


class _Writer(ABC):
    """What one caller writes. Leaving the ``with`` block without a commit aborts it."""

    @abstractmethod
    def write(self, *chunks: Chunk) -> None:
        """Append chunks, in one system call where that helps; none is kept after the return. Raises
        NO_SPACE, and MALFORMED above the announced length."""

    @abstractmethod
    def abort(self) -> None:
        """Leave nothing behind; harmless after a commit."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.abort()


class Upload(_Writer):
    """One payload being written by one caller."""

    @abstractmethod
    def commit(self) -> StoredPayload:
        """Make the payload visible, whole, under its id. Raises MALFORMED if it is not as long as
        announced."""


class PartUpload(_Writer):
    """One part being written by one caller."""

    @abstractmethod
    def commit(self, checksum: str | None) -> int:
        """Make the part count and return its bytes; the same part again changes nothing.

        ``checksum`` is the sender's xxh3-128 hex: CHECKSUM_MISMATCH, and the part is not there, if
        the bytes have another. INVALID_ARGUMENT if the part is already there with other bytes.
        """


class Payload(ABC):
    """An open payload. Its tensors stay valid as long as they are referenced, also after ``close``.

    Opened with its checksum, whatever it gives has been compared with the checksums of the blocks
    that hold it: raises PAYLOAD_DAMAGED naming tensor, rows and block.
    """

    header: Header
    """The frame's header."""

    nbytes: int
    """Bytes of the whole frame."""

    mapped: bool
    """Whether tensors are views of the store itself, so that reading rows again costs nothing."""

    @abstractmethod
    def torch(self, name: str, rows: Rows = None) -> torch.Tensor:
        """A tensor, or rows of its dimension 0 (a slice of step above 0, or a list of indices), as
        ``[len(rows), ...]``; only these are read.

        Raises tensor_codec's UnknownTensor, InvalidRows and FrameClosed.
        """

    @abstractmethod
    def check(self, name: str, rows: Rows = None) -> None:
        """Raise PAYLOAD_DAMAGED unless the rows are as they were stored; without a checksum nothing
        is compared."""

    @abstractmethod
    def close(self) -> None:
        """End reading; memory is freed once no tensor views it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class PayloadStore(ABC):
    """Payloads by id (1 to 80 of ``A-Za-z0-9_.-``, no leading dot). Safe for threads and for
    several processes."""

    @abstractmethod
    def create(self, payload_id: str, nbytes: int | None = None) -> Upload:
        """Begin to write a payload of ``nbytes`` (None: not known). Raises NO_SPACE,
        INVALID_ARGUMENT for the id."""

    def put(self, payload_id: str, buffers: Iterable[Chunk]) -> StoredPayload:
        """Write a whole payload at once, such as tensor_codec's ``Encoded``, replacing one of the
        same id."""
        with self.create(payload_id) as upload:
            # Not *buffers: a frame's len() is bytes, and would size the list of arguments.
            for buffer in buffers:
                upload.write(buffer)
            return upload.commit()

    @abstractmethod
    def put_part(self, payload_id: str, n: int, nbytes: int | None = None) -> PartUpload:
        """Begin to write part ``n`` (from 0) of ``nbytes`` (None: unknown); parts come in any
        order, again, at once."""

    @abstractmethod
    def parts(self, payload_id: str) -> list[int]:
        """The numbers of the parts that are there, ascending; empty for a payload without parts or
        unknown."""

    @abstractmethod
    def assemble(self, payload_id: str, count: int) -> StoredPayload:
        """Make parts 0 to ``count - 1``, joined in order, the payload; again gives the same answer.

        Raises INVALID_ARGUMENT naming the missing parts.
        """

    @abstractmethod
    def open(self, payload_id: str, checksum: str | None = None) -> Payload:
        """Open for reading. Raises PAYLOAD_NOT_FOUND, MALFORMED where the bytes are no frame, or
        PAYLOAD_DAMAGED.

        ``checksum`` is what the commit gave; without it the bytes are taken as they are.
        """

    @abstractmethod
    def stream(self, payload_id: str, checksum: str | None = None) -> Iterator[bytes]:
        """The bytes in pieces of about 1 MiB. Raises PAYLOAD_NOT_FOUND at once, before the first
        piece.

        With ``checksum``, as :meth:`open`; PAYLOAD_DAMAGED comes before the damaged piece.
        """

    @abstractmethod
    def nbytes(self, payload_id: str) -> int:
        """Bytes of the payload, or of its parts so far. Raises PAYLOAD_NOT_FOUND."""

    @abstractmethod
    def delete(self, payload_id: str) -> None:
        """Remove the payload and its parts, if there are any; tensors already read stay valid."""

    def discard(self, payload_id: str) -> None:
        """Delete what nobody needs any more; where that fails, the janitor will find it."""
        try:
            self.delete(payload_id)
        except ServiceError as error:
            _log.warning("payload.kept id=%s %s", payload_id, error)

    @abstractmethod
    def sweep(self, in_use: set[str], *, result_age_s: float, upload_age_s: float) -> list[str]:
        """Remove results older than ``result_age_s`` and all else older than ``upload_age_s``,
        except ids ``in_use``.

        Abandoned uploads and parts go by ``upload_age_s``. Returns the ids of which something was
        removed, sorted.
        """

    @abstractmethod
    def check(self) -> None:
        """Raise STORE_UNAVAILABLE unless a byte can be written."""
