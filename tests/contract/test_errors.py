"""One error tree: it survives pickling and the wire."""

from __future__ import annotations

import pickle

import pytest
from nexrl_contract.errors import ERRORS, ServiceError


@pytest.mark.parametrize("code", sorted(ERRORS))
def test_every_code_has_an_http_status_and_survives_the_wire_and_pickle(code: str) -> None:
    error = ServiceError(code, "why", tensor="input_ids", row=3)

    back = ServiceError.from_body(error.body())
    copy = pickle.loads(pickle.dumps(error))

    assert 400 <= error.kind.status < 600
    assert (back.code, back.message, back.details["row"]) == (code, "why", 3)
    assert (copy.code, copy.details) == (code, error.details)


def test_only_waiting_can_help_where_a_retry_is_offered() -> None:
    retryable = {code for code, kind in ERRORS.items() if kind.retryable}

    assert {"TOO_MANY_QUEUED", "REDIS_UNAVAILABLE", "NO_SPACE"} <= retryable
    assert not retryable & {"INVALID_VALUE", "OPERATION_FAILED", "IDEMPOTENCY_MISMATCH"}
