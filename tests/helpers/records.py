"""Records that a test puts into the ledger by itself."""

from __future__ import annotations

import time
from typing import Any

from nexrl_contract import names
from nexrl_contract.records import JobRecord


def new_job(operation: str = "barrier", *, identifier: str, queue: str, **others: Any) -> JobRecord:
    """A job that the ledger does not know yet."""
    return JobRecord(
        id=names.new_job_id(),
        operation=operation,
        identifier=identifier,
        queue=queue,
        created_at=time.time(),
        **others,
    )
