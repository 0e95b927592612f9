"""JobHandle: a submitted operation, which goes on whether anyone waits for it or not."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from nexrl_contract.records import FINAL_STATES

from ._exchange import MAX_WAIT_S, Budget

if TYPE_CHECKING:
    from ._http import HTTPTrainServiceClient
    from ._mock import MockTrainServiceClient

Value = TypeVar("Value")
FIRST_WAIT_S = 1.0
"""How long an awaited result is first asked for: a thread outlives a cancelled await by no more
than its request."""


class JobHandle:
    """One job of the service, which goes on whether anyone waits for it or not.

    A handle can be pickled, and used from any thread. The service keeps a result for a day after
    the job's end, and for 5 minutes once it was fetched: until then it can be fetched again.
    """

    def __init__(
        self,
        job_id: str,
        operation: str,
        client: HTTPTrainServiceClient | MockTrainServiceClient,
        ignored: tuple[str, ...] = (),
    ) -> None:
        self.id = job_id
        self.operation = operation
        self.ignored = ignored
        self._client = client

    def __repr__(self) -> str:
        return f"JobHandle(id={self.id!r}, operation={self.operation!r})"

    def status(self) -> dict[str, Any]:
        """The job's record now.

        "state" is "queued", "running", "finished", "failed", "cancelled" or "rolled_back". Others
        are "waits_for", "error" and times in seconds since 1970.
        """
        return self._client.job_view(self.id)

    def done(self) -> bool:
        """Whether the job has ended, well or not. Asks the service."""
        return self.status()["state"] in FINAL_STATES

    def result(self, timeout: float | None = None) -> dict[str, Any]:
        """Wait at most timeout seconds, None as long as it takes, and return what the blocking
        method would.

        Raises ServiceTimeout with this handle as .job, or the error that the job ended with.
        """
        return self.result_within(Budget(timeout))

    async def result_async(self, timeout: float | None = None) -> dict[str, Any]:
        """As result, without blocking the event loop. Cancelled, the job goes on, and its result
        can be asked for again.

        A thread asks for each awaited job, so any number may be awaited at once.
        """
        budget = Budget(timeout, longest_wait_s=FIRST_WAIT_S)
        try:
            while (
                result := await in_thread(partial(self._client.job_result, self, budget))
            ) is None:
                budget.longest_wait_s = min(2 * budget.longest_wait_s, MAX_WAIT_S)
            return result
        finally:
            budget.spend()

    def result_within(self, budget: Budget) -> dict[str, Any]:
        """As result, of what is left of a call's time."""
        while (result := self._client.job_result(self, budget)) is None:
            pass
        return result

    def cancel(self) -> dict[str, Any]:
        """Cancel a job that has not begun. Raises JobRunning or JobFinal where that is too late."""
        return self._client.cancel_job(self.id)


async def in_thread(call: Callable[[], Value]) -> Value:
    """What ``call`` returns or raises, from a thread of its own.

    Not from asyncio's pool: waits would fill it for everybody, and a program could not end before
    they do.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[Value] = loop.create_future()

    def settle(give: Callable[[Any], None], value: Any) -> None:
        if not outcome.done():
            give(value)

    def run() -> None:
        try:
            settled = partial(settle, outcome.set_result, call())
        except Exception as error:
            settled = partial(settle, outcome.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody awaits this any more
            loop.call_soon_threadsafe(settled)

    threading.Thread(target=run, name="nexrl-await", daemon=True).start()
    return await outcome
