"""A batch in the payload store as one rank sees it: only the rows that it asks for are read."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import torch
from nexrl_contract.envelope import Envelope
from nexrl_contract.operations import Operation
from nexrl_contract.tensors import sizes_of
from nexrl_payloads import PayloadStore

from nexrl_worker.training.batch.layout import Rows

_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


class PayloadRows(Rows):
    """The tensors of a stored batch that one operation reads; what else was sent is invisible.

    With the payload's ``checksum``, whatever it gives are the bytes that were stored: raises
    PAYLOAD_DAMAGED.
    """

    def __init__(
        self,
        store: PayloadStore,
        payload_id: str,
        operation: Operation,
        checksum: str | None = None,
    ) -> None:
        self._payload = store.open(payload_id, checksum)
        self._kept = _Kept(())
        header = self._payload.header
        self.header = {
            name: header.tensors[name] for name in operation.reads if name in header.tensors
        }
        self.metadata = Envelope.read(header.metadata).metadata
        self.size = sizes_of(self.header)[0]

    def keep(self, rows: Sequence[int]) -> None:
        """Say which rows (ascending) this rank works on, and read them once: all damage shows here,
        before the vote.

        Rows of a mapped payload stay where they are; those of another are fetched now, once for
        each tensor.
        """
        self._kept = _Kept(() if self._payload.mapped else tuple(rows))
        for name in self.header:
            if self._payload.mapped:
                self._payload.check(name, _contiguous(rows))
            else:
                self.tensor(name, rows)

    def tensor(self, name: str, rows: Sequence[int] | slice) -> torch.Tensor:
        """``[len(rows), ...]`` on CPU; a view of the mapped store, or of what is kept, where the
        rows are contiguous.

        Unsigned integers beyond 8 bits come as int64: torch computes next to nothing with them.
        """
        found = self._read(name, rows)
        return found.long() if found.dtype in _UNSIGNED else found

    def _read(self, name: str, rows: Sequence[int] | slice) -> torch.Tensor:
        rows = _contiguous(rows)
        places = self._kept.places(rows, self.size)
        if places is None:
            return self._payload.torch(name, rows)
        if name not in self._kept.tensors:
            self._kept.tensors[name] = self._payload.torch(name, _contiguous(self._kept.rows))
        return self._kept.tensors[name][places]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._kept = _Kept(())
        self._payload.__exit__(kind, error, trace)


class _Kept:
    """Some rows of a batch, each tensor's read once."""

    def __init__(self, rows: tuple[int, ...]) -> None:
        self.rows = rows
        self.tensors: dict[str, torch.Tensor] = {}
        self._place = {row: place for place, row in enumerate(rows)}

    def places(self, rows: Sequence[int] | slice, size: int) -> list[int] | slice | None:
        """Where ``rows`` are among those kept, None unless all of them are."""
        wanted = range(*rows.indices(size)) if isinstance(rows, slice) else rows
        if not wanted or not all(row in self._place for row in wanted):
            return None
        return _contiguous([self._place[row] for row in wanted])


def _contiguous(rows: Sequence[int] | slice) -> list[int] | slice:
    """A slice where the rows are a run, so that nothing has to be gathered."""
    if isinstance(rows, slice):
        return rows
    first = rows[0] if rows else 0
    if list(rows) == list(range(first, first + len(rows))):
        return slice(first, first + len(rows))
    return list(rows)
