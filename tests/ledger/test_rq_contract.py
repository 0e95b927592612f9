"""The bell overrides methods of RQ 3.0's worker: each must still be there, with the arguments that
we take."""

from __future__ import annotations

import inspect

import pytest
import rq
from nexrl_ledger import ResidentWorker
from nexrl_ledger.bell import BellJob
from rq.job import Job

OURS = {"run", "stop", "stopping", "_guarded"}
OVERRIDDEN = sorted(
    name
    for name, value in vars(ResidentWorker).items()
    if name not in OURS and not name.startswith("__") and inspect.isfunction(value)
)


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_what_the_resident_worker_overrides_is_still_rqs(name: str) -> None:
    theirs = inspect.signature(getattr(rq.SimpleWorker, name))

    assert list(inspect.signature(getattr(ResidentWorker, name)).parameters) == list(
        theirs.parameters
    )


def test_what_the_bell_job_overrides_is_still_rqs() -> None:
    assert isinstance(inspect.getattr_static(Job, "func"), property)
    assert isinstance(inspect.getattr_static(BellJob, "func"), property)
