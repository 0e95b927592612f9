"""One exchange, repeated until it is answered or its time is spent."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import replace

from ._answers import checked
from ._transport import CONNECT_TIMEOUT_S, Request, Response, Transport
from .errors import ServiceFault, ServiceTimeout, StatusError, Unreachable

MAX_WAIT_S = 25.0
MIN_CONNECT_S = 0.5
"""For a call whose time is spent, which asks once all the same."""
FIRST_BACK_OFF_S, MAX_BACK_OFF_S = 0.1, 5.0


class Budget:
    """Seconds that one call may take, uploads not counted; None is no limit, but ends with
    ``within``.

    longest_wait_s is how long the service may hold one answer back.
    """

    def __init__(
        self,
        seconds: float | None,
        within: Budget | None = None,
        *,
        longest_wait_s: float = MAX_WAIT_S,
    ) -> None:
        self._total = math.inf if seconds is None else float(seconds)
        self._start = time.monotonic()
        self._within = within
        self.longest_wait_s = longest_wait_s

    @property
    def endless(self) -> bool:
        """Whether there is no limit."""
        return math.isinf(self._total)

    def exclude(self, seconds: float) -> None:
        """Do not count these seconds."""
        self._start += seconds

    def remaining(self) -> float:
        """Seconds left; 0 when spent, inf without a limit."""
        own = max(0.0, self._total - (time.monotonic() - self._start))
        return own if self._within is None else min(own, self._within.remaining())

    def spend(self) -> None:
        """Leave nothing: whoever still asks stops."""
        self._total = 0.0

    def wait_s(self) -> float:
        """How long the service may hold the next answer back."""
        return min(self.longest_wait_s, self.remaining())

    def connect_s(self) -> float:
        """How long the next connection may take to be made."""
        return min(CONNECT_TIMEOUT_S, max(MIN_CONNECT_S, self.remaining()))

    def silence_s(self) -> float:
        """How long to wait for the next answer: a busy host, which answers late, is no lost one."""
        return self.wait_s() + min(10.0, max(2.0, self._total / 4))


def exchange(transport: Transport, build: Callable[[float], Request], budget: Budget) -> Response:
    """The first 2xx answer; build makes the request from the seconds that its answer may be held
    back.

    Sends again after what may pass: lost connections, 408, 429, 502 to 504. Raises Unreachable,
    ServiceTimeout or the StatusError that was left when the budget was spent.
    """
    attempt = 0
    while True:
        try:
            return _once(transport, build(budget.wait_s()), budget)
        except (Unreachable, ServiceTimeout, StatusError) as error:
            delay = max(_back_off_s(attempt), error.details.get("retry_after_s", 0.0))
            if not _passes(error) or delay >= budget.remaining():
                raise
        time.sleep(delay)
        attempt += 1


def _once(transport: Transport, request: Request, budget: Budget) -> Response:
    try:
        request = replace(request, connect_s=budget.connect_s())
        response = transport.send(request, budget.silence_s())
    finally:
        if request.body is not None:
            budget.exclude(request.body.take_seconds())
    return checked(request, response)


def _passes(error: ServiceFault) -> bool:
    """Whether the same request may be answered otherwise in a while."""
    if not isinstance(error, StatusError):
        return True
    if error.job_id is not None:  # how that job ended; asking again does not change it
        return False
    if error.code is None:
        return error.status in (408, 429, 502, 503, 504)
    passing = error.status in (408, 429, 502, 503) or error.code == "CHECKSUM_MISMATCH"
    return passing and bool(error.details["retryable"])


def _back_off_s(attempt: int) -> float:
    longest = min(MAX_BACK_OFF_S, FIRST_BACK_OFF_S * 2 ** min(attempt, 10))
    return random.uniform(longest / 2, longest)
