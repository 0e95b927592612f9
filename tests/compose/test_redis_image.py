"""The ledger on the Redis image that Compose runs, instead of the embedded server that the other
tests use."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial

import pytest
import redis
from nexrl_contract import names
from nexrl_contract.records import GroupRecord, Share
from nexrl_ledger import Fenced, Ledger, QueueConsumer, connect

from tests.helpers.docker import require_engine
from tests.helpers.records import new_job
from tests.helpers.servers import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.docker]
GROUP = "student"
QUEUE = names.train_queue(GROUP)
job = partial(new_job, identifier=GROUP, queue=QUEUE, fingerprint="f")


@pytest.fixture(scope="module")
def image_url() -> Iterator[str]:
    """A container of redis:7.2-bookworm for this module; the URL of its server."""
    require_engine()
    # Testcontainers' clean-up container cannot be pulled everywhere; the context manager cleans up
    # as well.
    os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")
    from testcontainers.core.container import DockerContainer

    with DockerContainer("redis:7.2-bookworm").with_exposed_ports(6379) as container:
        url = f"redis://{container.get_container_host_ip()}:{container.get_exposed_port(6379)}/0"
        wait_until(lambda: _answers(url), 30, "the Redis container")
        yield url


@pytest.fixture
def ledger(image_url: str) -> Iterator[Ledger]:
    """A ledger with one group in its first epoch."""
    ledger = Ledger(connect(image_url))
    ledger.client.flushall()
    placement = job("initialize_worker", queue=names.AGENT_QUEUE)
    ledger.submit(placement, group=GroupRecord(identifier=GROUP, created_at=time.time()))
    claimed = ledger.claim(names.AGENT_QUEUE, job_id=placement.id)
    assert claimed is not None
    ledger.finish(claimed, result={})
    ledger.groups.start_epoch(GROUP, [Share(agent="agent", slots=1, host="host")])
    yield ledger
    ledger.client.close()


def _answers(url: str) -> bool:
    client = connect(url)
    try:
        return bool(client.ping())
    except redis.exceptions.RedisError:
        return False
    finally:
        client.close()


def test_jobs_are_submitted_once_claimed_in_order_and_finished_under_the_fence(
    ledger: Ledger,
) -> None:
    """Every script of the ledger that a plain operation needs runs on this server, with the meaning
    it has elsewhere."""
    first, _ = ledger.submit(job(key="k"))
    again, replayed = ledger.submit(job(key="k"))
    second, _ = ledger.submit(job())
    assert (again.id, replayed) == (first.id, True)

    claimed = ledger.claim(QUEUE, identifier=GROUP, epoch=1)
    assert claimed is not None and claimed.id == first.id
    ledger.finish(claimed, epoch=1, seq=1, result={"x": 1})
    record = ledger.require_job(first.id)
    assert (record.state, record.result, record.seq) == ("finished", {"x": 1}, 1)

    ledger.groups.start_epoch(GROUP, [Share(agent="agent", slots=1, host="host")])
    with pytest.raises(Fenced):
        ledger.claim(QUEUE, identifier=GROUP, epoch=1)
    ledger.groups.mark_down(GROUP, 2, "gone")
    assert ledger.require_job(second.id).state == "failed"


def test_a_consumer_is_woken_and_removes_the_wake_up(ledger: Ledger, image_url: str) -> None:
    """Blocking reads, RQ's records and their removal work on this server; each job runs once."""
    submitted = [ledger.submit(job())[0].id for _ in range(3)]
    ran: list[str] = []

    def drain() -> None:
        while (claimed := ledger.claim(QUEUE, identifier=GROUP, epoch=1)) is not None:
            ledger.finish(claimed, epoch=1, seq=len(ran) + 1)
            ran.append(claimed.id)

    def drain_and_stop_when_silent() -> None:
        drain()
        if len(ran) == 3 and not ledger.client.keys("rq:job:*-run"):
            consumer.stop()
        elif time.monotonic() > deadline:
            raise TimeoutError(
                f"after 20 s {len(ran)} of 3 jobs had run; keys {ledger.client.keys('rq:*')}"
            )

    deadline = time.monotonic() + 20
    consumer = QueueConsumer(image_url, QUEUE, name="test", on_wake=drain_and_stop_when_silent)
    consumer.run()

    assert ran == submitted
    assert ledger.queue_length(QUEUE) == 0
