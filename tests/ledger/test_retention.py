"""What finished work leaves behind is bounded by count, and nothing that was done can be done again
for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import pytest
from nexrl_contract import names
from nexrl_contract.errors import ServiceError
from nexrl_contract.records import GroupRecord, JobRecord, PayloadRef
from nexrl_ledger import Ledger, connect, retention

from tests.helpers.records import new_job

GROUP = "student"
QUEUE = names.train_queue(GROUP)
job = partial(new_job, identifier=GROUP, queue=QUEUE, fingerprint="f")


@pytest.fixture
def ledger(redis_url: str) -> Iterator[Ledger]:
    ledger = Ledger(connect(redis_url))
    record = GroupRecord(identifier=GROUP, state="ready", epoch=1)
    ledger.client.hset(names.group_key(GROUP), mapping=record.to_hash())
    yield ledger
    ledger.client.close()


def finished(ledger: Ledger, count: int, **result: PayloadRef) -> list[JobRecord]:
    """So many jobs that have ended, each with a key."""
    for number in range(count):
        ledger.submit(job(key=f"key-{number}-{time.monotonic_ns()}"))
        claimed = ledger.claim(QUEUE, identifier=GROUP, epoch=1)
        assert claimed is not None
        ledger.finish(claimed, epoch=1, result=None if result else {}, **result)
    return [found for found in reversed(ledger.jobs(limit=count)) if found.final]


def jobs_and_keys(ledger: Ledger) -> int:
    return len(
        [
            *ledger.client.scan_iter(match="nexrl:job:*"),
            *ledger.client.scan_iter(match="nexrl:key:*"),
        ]
    )


def test_only_the_newest_jobs_are_kept(ledger: Ledger) -> None:
    """An old one is 410, not 404, and so is its key: a request that comes again is refused, and
    nothing runs twice."""
    jobs = finished(ledger, 12)
    assert ledger.retention.drop_finished(5, at_least_s=0.0) == 7
    assert jobs_and_keys(ledger) == 10
    assert [kept.id for kept in ledger.jobs()] == [each.id for each in reversed(jobs[7:])]
    with pytest.raises(ServiceError, match="EXPIRED"):
        ledger.require_job(jobs[6].id)
    with pytest.raises(ServiceError, match="JOB_NOT_FOUND"):
        ledger.require_job(names.new_job_id())
    for again in (
        lambda: ledger.submit(job(key=jobs[0].key)),
        lambda: ledger.replay_of(jobs[0].key, "f"),
    ):
        with pytest.raises(ServiceError, match="EXPIRED"):
            again()
    assert ledger.submit(job(key=jobs[7].key)) == (
        ledger.require_job(jobs[7].id),
        True,
    )


def test_what_has_not_ended_or_has_just_ended_stays(ledger: Ledger) -> None:
    """However many there are."""
    queued, _ = ledger.submit(job("destroy", queue="train:other", key="queued"))
    finished(ledger, 3)
    assert ledger.retention.drop_finished(0, at_least_s=60.0) == 0
    assert ledger.retention.drop_finished(0, at_least_s=0.0) == 3
    assert ledger.require_job(queued.id).state == "queued"


def test_spent_keys_are_bounded_by_count_and_kept_for_an_hour(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "SPENT_KEPT", 4)
    finished(ledger, 6)
    ledger.retention.drop_finished(0, at_least_s=0.0)
    assert ledger.client.zcard(names.SPENT_KEY) == 6
    for older, key in enumerate(ledger.client.zrange(names.SPENT_KEY, 0, 2)):
        ledger.client.zincrby(names.SPENT_KEY, -2 * retention.SPENT_KEPT_S - older, key)
    ledger.retention.drop_finished(0, at_least_s=0.0)
    assert ledger.client.zcard(names.SPENT_KEY) == 4


def test_a_delivered_result_is_due_once_nobody_has_read_it_for_a_while(ledger: Ledger) -> None:
    """Whoever reads it again holds it; once it is being removed nobody begins to, until it has
    gone."""
    ledger.retention.delivered("a")
    assert ledger.retention.take_due_results(keep_s=60.0) == []
    ledger.client.zadd(names.DELIVERED_KEY, {"a": time.time() - 100, "b": time.time() - 100})
    assert ledger.retention.hold_result("a")
    assert ledger.retention.take_due_results(keep_s=60.0) == ["b"]
    assert not ledger.retention.hold_result("b")
    assert ledger.retention.take_due_results(keep_s=60.0) == ["b"], (
        "one who died before it was removed"
    )
    ledger.retention.forget_results(["b"])
    assert ledger.retention.take_due_results(keep_s=60.0) == []
    assert ledger.retention.hold_result("never delivered")


def test_results_go_with_their_jobs_unless_they_are_being_read(ledger: Ledger) -> None:
    jobs = finished(ledger, 2, result_payload=PayloadRef(id="r", nbytes=1))
    ledger.retention.delivered(jobs[0].id)
    assert ledger.retention.drop_finished(0, at_least_s=0.0) == 1
    assert ledger.retention.take_due_results(keep_s=60.0) == [jobs[1].id]
    assert ledger.require_job(jobs[0].id).state == "finished"


def test_records_of_destroyed_groups_are_bounded(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By count, but none that has just ended; one that was made again is no destroyed one."""
    monkeypatch.setattr(retention, "GROUPS_KEPT", 2)

    def make(name: str) -> None:
        placement = new_job("initialize_worker", identifier=name, queue=names.AGENT_QUEUE)
        ledger.submit(placement, group=GroupRecord(identifier=name))

    for number in range(6):
        make(f"group-{number}")
        ledger.groups.mark_destroyed(f"group-{number}", None)
    make("group-0")

    assert ledger.retention.drop_destroyed(at_least_s=60.0) == 0
    assert ledger.retention.drop_destroyed(at_least_s=0.0) == 3
    left = [
        name
        for name in (f"group-{number}" for number in range(6))
        if ledger.groups.get(name) is not None
    ]
    assert left == ["group-0", "group-4", "group-5"]
    assert ledger.groups.identifiers() == ["group-0"]
    ledger.client.zadd(names.DESTROYED_KEY, {"group-4": 1.0})
    assert ledger.retention.drop_destroyed(at_least_s=0.0) == 0
    assert ledger.client.zcard(names.DESTROYED_KEY) == 1, "its record has ended by itself"
