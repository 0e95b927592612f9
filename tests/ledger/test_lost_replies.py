"""What Redis did although nobody heard of it: a reply is lost, a server goes away, and still
everything happens once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from nexrl_contract import names
from nexrl_contract.records import GroupRecord, Share
from nexrl_ledger import Ledger, QueueConsumer, connect, until_redis

from tests.helpers.lossy_redis import LosesReplies
from tests.helpers.records import new_job
from tests.helpers.servers import RedisServer, wait_until

GROUP = "student"
QUEUE = names.train_queue(GROUP)
job = partial(new_job, identifier=GROUP, queue=QUEUE, fingerprint="f")


@pytest.fixture
def lossy(redis_server: RedisServer, redis_url: str) -> Iterator[LosesReplies]:
    proxy = LosesReplies(redis_server.port)
    yield proxy
    proxy.close()


@pytest.mark.parametrize("key", ["k", None])
def test_a_submit_whose_reply_is_lost_is_one_job_and_no_replay(
    lossy: LosesReplies, redis_url: str, key: str | None
) -> None:
    """A replay would make the gateway drop the payload of a job that is queued; a second write
    would run it again."""
    ledger = Ledger(connect(lossy.url))
    ledger.client.ping()
    wanted = job(key=key)
    lossy.command = b"EXEC"

    recorded, replayed = ledger.submit(wanted)

    assert lossy.command is None, "nothing was lost"
    assert (recorded.id, replayed) == (wanted.id, False)
    assert Ledger(connect(redis_url)).client.llen(f"rq:queue:{QUEUE}") == 1


def test_a_save_is_handed_over_once_though_the_reply_is_lost_and_the_checkpointer_is_fast(
    redis_url: str,
) -> None:
    """The repetition must not look like a fence: rank 0 would end, and the weights with it."""
    ledger = Ledger(connect(redis_url))
    ledger.submit(
        job("save_checkpoint"),
        group=GroupRecord(identifier=GROUP, created_at=time.time()),
    )
    ledger.groups.start_epoch(GROUP, [Share(agent="agent", slots=1, host="host")])
    saved = ledger.claim(QUEUE, identifier=GROUP, epoch=1)
    assert saved is not None

    ledger.hand_over(saved, names.CHECKPOINT_QUEUE, epoch=1, params={})
    published = ledger.claim(names.CHECKPOINT_QUEUE, job_id=saved.id)
    ledger.hand_over(saved, names.CHECKPOINT_QUEUE, epoch=1, params={})

    assert published is not None
    ledger.finish(published, result={"path": "/x"})
    ledger.hand_over(saved, names.CHECKPOINT_QUEUE, epoch=1, params={})
    assert ledger.require_job(saved.id).state == "finished"


def test_a_consumer_stops_while_redis_is_away(tmp_path: Path) -> None:
    """An agent that waited for Redis could not keep its groups' state before it is killed."""
    server = RedisServer(tmp_path)
    server.start()
    ticks = []

    client = connect(server.url)
    consumer = QueueConsumer(
        server.url, QUEUE, name="w", on_wake=lambda: ticks.append(client.ping())
    )
    thread = threading.Thread(target=consumer.run, daemon=True)
    thread.start()
    wait_until(lambda: ticks, 10)
    server.kill()

    consumer.stop()
    thread.join(8)

    assert not thread.is_alive()


def test_what_a_redis_that_takes_no_writes_refuses_is_said_again_when_it_takes_them(
    redis_url: str,
) -> None:
    """Its disk is full, or a replica is missing. A finish that gave up would leave the job at the
    head of its queue for ever."""
    ledger = Ledger(connect(redis_url))
    ledger.submit(job(), group=GroupRecord(identifier=GROUP, created_at=time.time()))
    ledger.groups.start_epoch(GROUP, [Share(agent="agent", slots=1, host="host")])
    running = ledger.claim(QUEUE, identifier=GROUP, epoch=1)
    assert running is not None
    refused = []
    ledger.client.config_set("min-replicas-to-write", 1)

    def take_writes_again() -> None:
        refused.append(ledger.require_job(running.id).state)
        ledger.client.config_set("min-replicas-to-write", 0)

    try:
        until_redis(lambda: ledger.finish(running, epoch=1), while_waiting=take_writes_again)
    finally:
        ledger.client.config_set("min-replicas-to-write", 0)

    assert (refused, ledger.require_job(running.id).state) == (["running"], "finished")


def test_a_consumer_is_ticked_while_redis_takes_no_writes(redis_url: str) -> None:
    """A group's rank 0 is asked to stop by a file: unless it looks, it is killed and its weights
    are lost."""
    client = connect(redis_url)
    client.config_set("min-replicas-to-write", 1)
    consumer = QueueConsumer(redis_url, QUEUE, name="w", on_wake=lambda: consumer.stop())
    thread = threading.Thread(target=consumer.run, daemon=True)
    try:
        thread.start()
        thread.join(5)
        assert not thread.is_alive()
    finally:
        client.config_set("min-replicas-to-write", 0)
        consumer.stop()
        thread.join(8)
