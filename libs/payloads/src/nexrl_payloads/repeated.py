"""A part that is sent again."""

from __future__ import annotations

from typing import Self

from nexrl_contract.errors import ServiceError

from .common import Tally, byte_views, same_part
from .protocol import Chunk


class RepeatedPart:
    """A part that is there already as ``known`` (nbytes, checksum), or comes too late (None):
    hashed, then compared."""

    def __init__(
        self, payload_id: str, n: int, nbytes: int | None, known: tuple[int, str] | None
    ) -> None:
        self._payload_id = payload_id
        self._n = n
        self._known = known
        self._what = f"part {n} of payload {payload_id}"
        self._tally = Tally(self._what, nbytes, whole=True)

    def write(self, *chunks: Chunk) -> None:
        self._tally.add(byte_views(chunks))

    def commit(self, checksum: str | None) -> int:
        self._tally.finish()
        self._tally.verify(checksum)
        if self._known is None:
            raise ServiceError(
                "INVALID_ARGUMENT",
                (
                    f"payload {self._payload_id} is put together already, without part {self._n}: "
                    "use "
                    "a new payload id"
                ),
            )
        same_part(
            self._payload_id, self._n, self._known, (self._tally.nbytes, self._tally.checksum)
        )
        return self._tally.nbytes

    def abort(self) -> None:
        """There is nothing to leave behind."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.abort()
