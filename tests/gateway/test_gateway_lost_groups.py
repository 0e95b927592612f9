"""A group whose agent is gone for good ends with a cause, and with it every job that waits for
it."""

from __future__ import annotations

import time
from collections.abc import Callable

from nexrl_contract.records import Share
from nexrl_gateway.upkeep import LostGroups
from nexrl_ledger import Ledger

from tests.helpers.gateway import ASYNC, Gateway, PlayedGroup, refusal
from tests.helpers.servers import wait_until

LONG_AGO = time.time() - 3600


def test_a_group_that_nobody_has_any_more_goes_down_and_fails_its_jobs(
    gateway: Gateway, ledger: Ledger, make_group: Callable[..., PlayedGroup]
) -> None:
    make_group("lost", placement=[Share(agent="gone", slots=1)], heartbeat=LONG_AGO)
    make_group("kept", placement=[Share(agent="agent", slots=1)], heartbeat=LONG_AGO)
    make_group("alive", placement=[Share(agent="gone", slots=1)])
    job_id = gateway.post("/barrier?identifier=lost", headers=ASYNC).json()["id"]
    groups = LostGroups(ledger, patience_s=0.3)

    assert groups.look() == [], "silence is observed for a while first"
    assert wait_until(groups.look, 5) == ["lost"]

    states = {group.identifier: group.state for group in ledger.groups.living()}
    assert states == {"lost": "down", "kept": "ready", "alive": "ready"}
    assert (
        "agent gone" in refusal(gateway.get(f"/jobs/{job_id}/result"), 503, "GROUP_DOWN")["message"]
    )


def test_a_gap_in_the_watch_begins_it_anew(
    ledger: Ledger, gateway: Gateway, make_group: Callable[..., PlayedGroup]
) -> None:
    """After Redis was away, agents get their time to be heard again."""
    make_group("lost", placement=[Share(agent="gone", slots=1)], heartbeat=LONG_AGO)
    groups = LostGroups(ledger, patience_s=0.2)
    groups.look()
    time.sleep(0.3)
    groups.forget()

    assert groups.look() == []
