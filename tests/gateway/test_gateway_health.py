"""/health and /ready say what is: a Redis that would lose what it acknowledges or has lost it, and
work that nobody takes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from nexrl_contract import names
from nexrl_contract.records import JobRecord, ProcessRecord, Share
from nexrl_gateway.upkeep import Watch
from nexrl_ledger import Ledger

from tests.helpers.gateway import ASYNC, Gateway, PlayedGroup


def reasons(gateway: Gateway, status: int = 200) -> list[str]:
    """Of /ready, which has the status, and of /health alike."""
    shown = gateway.get("/health").json()
    ready = gateway.get("/ready")
    assert (ready.status_code, ready.json()["ready"]) == (status, status == 200), ready.text
    assert ready.json()["reasons"] == shown["reasons"]
    assert shown["status"] == ("degraded" if shown["reasons"] else "healthy")
    found: list[str] = shown["reasons"]
    return found


@pytest.mark.parametrize(
    ("setting", "bad", "good", "advice"),
    [
        ("maxmemory-policy", "allkeys-lru", "noeviction", "CONFIG SET maxmemory-policy noeviction"),
        (
            "maxmemory-policy",
            "volatile-ttl",
            "noeviction",
            "CONFIG SET maxmemory-policy noeviction",
        ),
        ("appendonly", "no", "yes", "CONFIG SET appendonly yes"),
    ],
)
def test_a_redis_that_would_forget_is_not_ready(
    setting: str, bad: str, good: str, advice: str, gateway: Gateway, group: PlayedGroup
) -> None:
    """With what to set; and once that is set all is well."""
    client = group.ledger.client
    assert reasons(gateway) == []
    client.config_set(setting, bad)
    try:
        (reason,) = reasons(gateway, 503)
    finally:
        client.config_set(setting, good)
    assert advice in reason
    assert reasons(gateway) == []


def test_a_redis_that_does_not_say_is_believed(gateway: Gateway, group: PlayedGroup) -> None:
    """A managed one may refuse to tell."""
    client = group.ledger.client
    client.config_set("maxmemory-policy", "allkeys-lru")
    client.execute_command("ACL", "SETUSER", "default", "-info")
    try:
        assert reasons(gateway) == []
    finally:
        client.execute_command("ACL", "SETUSER", "default", "+info")
        client.config_set("maxmemory-policy", "noeviction")


def test_an_emptied_redis_is_said_until_a_group_is_made_again(
    gateway: Gateway, group: PlayedGroup, ledger: Ledger
) -> None:
    """Its agents and ranks may well live; what it held is gone."""
    agent = ProcessRecord(name="agent", host="here", slots=4, free=4)
    assert reasons(gateway) == []
    for _ in range(2):
        ledger.client.flushall()
        ledger.agents.beat(agent)
        for _ in range(2):
            (reason,) = reasons(gateway)
            assert reason.startswith("Redis was emptied")
        PlayedGroup(ledger, gateway.payloads)
        assert reasons(gateway) == []
    ledger.client.srem(names.GROUPS_KEY, "student")
    assert reasons(gateway) == []


def test_a_redis_that_was_emptied_while_no_gateway_ran(ledger: Ledger, tmp_path: Path) -> None:
    """The next one knows from the data folder; a second one from Redis; a new data folder knows
    nothing."""
    assert Watch(ledger, tmp_path / "data").emptied() is None
    assert Watch(ledger, tmp_path / "data").emptied() is None
    ledger.client.flushall()
    for folder in ("data", "data", "other"):
        assert "emptied" in str(Watch(ledger, tmp_path / folder).emptied())
    ledger.client.flushall()
    assert Watch(ledger, tmp_path / "new").emptied() is None


def test_missing_agents_and_checkpointers_are_named(gateway: Gateway, ledger: Ledger) -> None:
    """An agent always, a checkpointer while saves wait for one."""
    PlayedGroup(ledger, gateway.payloads, placement=[Share(agent="local", slots=1)])
    (reason,) = reasons(gateway)
    assert "its agent local is not heard" in reason
    ledger.agents.beat(ProcessRecord(name="local"))
    assert reasons(gateway) == []
    _wait_in(ledger, names.CHECKPOINT_QUEUE, "save_checkpoint")
    (reason,) = reasons(gateway)
    assert "no checkpointer is heard, and 1 saves wait" in reason
    ledger.checkpointers.beat(ProcessRecord(name="local-1"))
    assert reasons(gateway) == []
    ledger.agents.sign_off("agent")
    ledger.agents.sign_off("local")
    assert any("no agent is heard" in reason for reason in reasons(gateway))


def test_work_that_an_idle_consumer_does_not_take(
    gateway: Gateway,
    group: PlayedGroup,
    ledger: Ledger,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Named with its job once it has waited long; what waits for a reason, or behind something,
    does not count."""
    monkeypatch.setattr("nexrl_gateway.upkeep.QUIET_S", 0.3)
    ledger.checkpointers.beat(ProcessRecord(name="local-1"))
    watch = Watch(ledger, tmp_path)
    first = gateway.post("/barrier", headers=ASYNC).json()["id"]
    gateway.post("/barrier", headers=ASYNC)
    save = _wait_in(ledger, names.CHECKPOINT_QUEUE, "save_checkpoint")
    placement = _wait_in(ledger, names.AGENT_QUEUE, "initialize_worker")

    def stuck() -> list[str]:
        watch.look()
        time.sleep(0.4)
        watch.look()
        return watch.stuck()

    watch.look()
    assert watch.stuck() == []
    on_train, on_agents, on_saves = stuck()
    assert "group student is ready and idle" in on_train
    assert first in on_train
    assert placement in on_agents
    assert save in on_saves
    job = group.claim()
    ledger.explain_wait(placement, "two free slots")
    ledger.claim(names.CHECKPOINT_QUEUE)
    assert stuck() == []
    assert job is not None
    group.end(job, {})
    assert len(stuck()) == 1


def _wait_in(ledger: Ledger, queue: str, operation: str) -> str:
    job = JobRecord(
        id=names.new_job_id(),
        operation=operation,
        identifier="other",
        queue=queue,
        created_at=time.time(),
    )
    ledger.submit(job)
    return job.id


def test_health_without_redis_has_its_reason(gateway: Gateway, group: PlayedGroup) -> None:
    """The same words in the OpenAPI page's example."""
    page: dict[str, Any] = gateway.get("/openapi.json").json()["paths"]
    for path in ("/health", "/ready"):
        shown = page[path]["get"]["responses"]["503"]["content"]["application/json"]["example"]
        assert shown["reasons"] == ["Redis does not answer"]
