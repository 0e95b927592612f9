"""Agents that are kept for one group each (``NEXRL_IDENTIFIER``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from nexrl_contract.records import ProcessRecord
from nexrl_ledger import Ledger

from tests.helpers.gateway import ASYNC, Gateway, refusal


@pytest.fixture
def fixed(ledger: Ledger) -> Ledger:
    """Two agents, and none for any group."""
    ledger.agents.sign_off("agent")
    ledger.agents.beat(ProcessRecord(name="one", slots=2, free=2, identifier="student"))
    ledger.agents.beat(ProcessRecord(name="two", slots=1, free=1, identifier="teacher"))
    return ledger


@pytest.fixture
def wanted(tmp_path: Path) -> dict[str, Any]:
    """A group of two ranks."""
    (tmp_path / "config.json").write_text("{}")
    return {"config_dict": {"actor": {"model": {"path": str(tmp_path)}}}, "world_size": 2}


def test_another_group_is_refused_for_good_and_the_fixed_ones_are_named(
    gateway: Gateway, fixed: Ledger, wanted: dict[str, Any]
) -> None:
    """No retry would help: 422. An agent for any group ends the refusal."""
    error = refusal(
        gateway.post("/initialize?identifier=critic", json=wanted), 422, "NO_SUCH_SLOTS"
    )
    assert error["retryable"] is False
    assert (error["key"], error["identifiers"]) == ("identifier", ["student", "teacher"])
    assert "student, teacher" in error["message"]
    assert gateway.get("/get_models").json()["count"] == 0

    fixed.agents.beat(ProcessRecord(name="three", slots=2, free=2))
    assert (
        gateway.post("/initialize?identifier=critic", json=wanted, headers=ASYNC).status_code == 202
    )


def test_a_fixed_group_is_placed_up_to_its_world_size(
    gateway: Gateway, fixed: Ledger, wanted: dict[str, Any]
) -> None:
    """Its agent has as many slots as NEXRL_WORLD_SIZE says."""
    error = refusal(
        gateway.post("/initialize?identifier=teacher", json=wanted), 422, "NO_SUCH_SLOTS"
    )
    assert (error["key"], error["slots"]) == ("world_size", 1)
    assert (
        gateway.post("/initialize?identifier=student", json=wanted, headers=ASYNC).status_code
        == 202
    )
