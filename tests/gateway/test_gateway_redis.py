"""The gateway while Redis loses answers or takes no writes: what a client sees, and that asking
again is enough."""

from __future__ import annotations

from pathlib import Path

from nexrl_ledger import Ledger, connect

from tests.helpers.gateway import Gateway, PlayedGroup, refusal
from tests.helpers.lossy_redis import LosesReplies
from tests.helpers.servers import RedisServer


def test_a_destroy_that_redis_did_not_answer_is_done_when_it_is_asked_for_again(
    tmp_path: Path, redis_server: RedisServer, redis_url: str
) -> None:
    """A group that is down has no ranks that would end the job: what one attempt began the next one
    must finish."""
    lossy = LosesReplies(redis_server.port)
    gateway = Gateway(tmp_path, lossy.url, NEXRL_WAIT_LIMIT_S="2")
    ledger = Ledger(connect(redis_url))
    for identifier in ("first", "second"):
        PlayedGroup(ledger, gateway.payloads, identifier, state="down", cause="rank 0 was killed")
    assert (
        gateway.post("/destroy?identifier=first").status_code == 200
    )  # Redis knows the scripts now
    lossy.command = b"EVALSHA"
    key = {"Idempotency-Key": "destroy-1"}

    refusal(gateway.post("/destroy?identifier=second", headers=key), 503, "REDIS_UNAVAILABLE")

    assert lossy.command is None, "nothing was lost"
    again = gateway.post("/destroy?identifier=second", headers=key)
    assert (again.status_code, again.json().get("status")) == (200, "success"), again.text
    assert ledger.groups.living() == []
    gateway.stop()
    lossy.close()
    ledger.client.close()


def test_a_redis_that_takes_no_writes_is_away(gateway: Gateway, group: PlayedGroup) -> None:
    """Its disk is full, or a replica is missing: 503, which a client repeats, and the next attempt
    is accepted."""
    barrier = "/barrier?identifier=student"
    client = group.ledger.client
    client.config_set("min-replicas-to-write", 1)
    try:
        refused = gateway.post(barrier, headers={"Prefer": "respond-async"})
    finally:
        client.config_set("min-replicas-to-write", 0)

    refusal(refused, 503, "REDIS_UNAVAILABLE")
    assert "Retry-After" in refused.headers
    assert gateway.post(barrier, headers={"Prefer": "respond-async"}).status_code == 202


def test_a_password_that_redis_does_not_take_is_no_passing_trouble(tmp_path: Path) -> None:
    """Whoever started the gateway has to help; a client need not wait for it."""
    server = RedisServer(tmp_path)
    server.start("--appendonly", "no")
    with connect(server.url) as client:
        client.config_set("requirepass", "secret")
    gateway = Gateway(tmp_path / "gateway", server.url)
    try:
        error = refusal(gateway.post("/barrier?identifier=student"), 503, "REDIS_UNAVAILABLE")
        assert error["retryable"] is False and "password" in error["message"]
    finally:
        gateway.stop()
        server.kill()
