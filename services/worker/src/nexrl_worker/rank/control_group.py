"""How the ranks of a group talk besides the mathematics: commands from rank 0, votes, and gathering
rows, on a gloo group of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from nexrl_contract.errors import ServiceError

from nexrl_worker.rank.request import Refused, as_service_error

Answer = TypeVar("Answer")
_IDLE_LIMIT = timedelta(days=7)
_MAX_DIMS = 3
_DTYPES = (torch.float32, torch.int64)


class ControlGroup:
    """The control group of all ranks. Every public method is collective: all ranks call it, in the
    same order."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=_IDLE_LIMIT)

    def broadcast(self, message: dict[str, Any] | None = None, src: int = 0) -> dict[str, Any]:
        """The message of rank ``src``, on every rank; JSON, because nothing that crosses a process
        is unpickled."""
        text = json.dumps(message, default=str).encode()
        if self.size > 1:
            length = torch.tensor([len(text)])
            dist.broadcast(length, src=src, group=self._group)
            mine = self.rank == src
            data = torch.frombuffer(bytearray(text), dtype=torch.uint8) if mine else None
            if data is None:
                data = torch.empty(int(length[0]), dtype=torch.uint8)
            dist.broadcast(data, src=src, group=self._group)
            text = data.numpy().tobytes()
        return dict(json.loads(text))

    def vote(self, act: Callable[[], Answer]) -> Answer:
        """Run a *local* ``act`` on every rank and vote: its answer, or on all ranks the first
        failing rank's error.

        The error is :class:`Refused` with that rank's number, so a failed operation leaves the
        group in step and alive.
        """
        answer: Answer | None = None
        error: ServiceError | None = None
        try:
            answer = act()
        except Exception as caught:
            error = as_service_error(caught, self.rank)
        first = torch.tensor([self.size if error is None else self.rank])
        if self.size > 1:
            dist.all_reduce(first, op=dist.ReduceOp.MIN, group=self._group)
        if (failed := int(first[0])) < self.size:
            body = error.body() if error is not None else None
            raise Refused.from_body(self.broadcast(body, src=failed))
        return answer  # type: ignore[return-value] # act() returned it

    def decide(self, act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What rank 0 makes of ``act``, as JSON on every rank; or, on all of them, its error as
        :class:`Refused`."""
        message: dict[str, Any] | None = None
        if self.rank == 0:
            try:
                message = {"made": act()}
            except Exception as caught:
                message = {"error": as_service_error(caught, self.rank).body()}
        message = self.broadcast(message)
        if "error" in message:
            raise Refused.from_body(message["error"])
        return dict(message["made"])

    def gather_lengths(self, mine: list[int]) -> list[list[int]] | None:
        """Rank 0 gets every rank's list of integers, in rank order; the others None."""
        parts = self.collect(torch.tensor(mine, dtype=torch.int64))
        return None if parts is None else [[] if part is None else part.tolist() for part in parts]

    def collect(self, mine: torch.Tensor | None) -> list[torch.Tensor | None] | None:
        """Rank 0 gets every rank's CPU tensor (float32 or int64, any shape, None for nothing), in
        rank order."""
        if self.size == 1:
            return [mine]
        if self.rank != 0:
            dist.send(_shape_of(mine), dst=0, group=self._group)
            if mine is not None and mine.numel():
                dist.send(mine.contiguous(), dst=0, group=self._group)
            return None
        every = [mine]
        for rank in range(1, self.size):
            described = torch.empty(_MAX_DIMS + 2, dtype=torch.int64)
            dist.recv(described, src=rank, group=self._group)
            dims, kind, *shape = described.tolist()
            part = None if dims < 0 else torch.empty(shape[:dims], dtype=_DTYPES[kind])
            if part is not None and part.numel():
                dist.recv(part, src=rank, group=self._group)
            every.append(part)
        return every

    def barrier(self) -> None:
        """Every rank has come here."""
        dist.barrier(group=self._group)


def _shape_of(tensor: torch.Tensor | None) -> torch.Tensor:
    """Dimensions (-1: no tensor), dtype and shape, in as many numbers for every tensor."""
    if tensor is None:
        return torch.tensor([-1] + [0] * (_MAX_DIMS + 1))
    shape = [*tensor.shape] + [0] * (_MAX_DIMS - tensor.dim())
    return torch.tensor([tensor.dim(), _DTYPES.index(tensor.dtype), *shape])
