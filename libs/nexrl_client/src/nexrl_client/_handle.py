"""JobHandle: a submitted operation, which goes on whether anyone waits for it or not."""

from __future__ import annotations

from typing import Any, Protocol

from nexrl_contract.records import FINAL_STATES


class JobSource(Protocol):
    """What a handle asks: a client."""

    def job_view(self, job_id: str) -> dict[str, Any]:
        """The job's record."""
        ...

    def job_result(self, job: JobHandle, timeout: float | None) -> dict[str, Any]:
        """The job's result, waited for."""
        ...

    def cancel_job(self, job_id: str) -> dict[str, Any]:
        """Cancel it."""
        ...


class JobHandle:
    """One job of the service. It can be pickled, and used from any thread.

    A result is kept by the service for 24 hours after the job ended, and can be fetched any number of times.
    """

    def __init__(self, job_id: str, operation: str, source: JobSource, ignored: tuple[str, ...] = ()) -> None:
        self.id = job_id
        self.operation = operation
        self.ignored = ignored
        self._source = source

    def __repr__(self) -> str:
        return f"JobHandle(id={self.id!r}, operation={self.operation!r})"

    def status(self) -> dict[str, Any]:
        """The job's record now: state ("queued", "running", "finished", ...), waits_for, error, times in seconds."""
        return self._source.job_view(self.id)

    def done(self) -> bool:
        """Whether the job has ended, well or not."""
        return self.status()["state"] in FINAL_STATES

    def result(self, timeout: float | None = None) -> dict[str, Any]:
        """Wait at most timeout seconds (None: as long as it takes) and return what the blocking method would.

        Raises ServiceTimeout with this handle as .job, or the error that the job ended with.
        """
        return self._source.job_result(self, timeout)

    def cancel(self) -> dict[str, Any]:
        """Cancel a job that waits. Raises JobRunning or JobFinal where that is too late."""
        return self._source.cancel_job(self.id)
