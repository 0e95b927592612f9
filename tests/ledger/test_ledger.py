"""The ledger on a real server: idempotent submits, strict order, fences, and wake-ups that may be
lost or doubled."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
import rq
from nexrl_contract import names
from nexrl_contract.errors import ServiceError
from nexrl_contract.records import GroupRecord, JobRecord, Share
from nexrl_ledger import Fenced, Ledger, QueueConsumer, connect

from tests.helpers.records import new_job
from tests.helpers.servers import wait_until

GROUP = "student"
QUEUE = names.train_queue(GROUP)
job = partial(new_job, identifier=GROUP, queue=QUEUE, fingerprint="f")


@pytest.fixture
def ledger(redis_url: str) -> Iterator[Ledger]:
    ledger = Ledger(connect(redis_url))
    placement = job("initialize_worker", queue=names.AGENT_QUEUE)
    ledger.submit(placement, group=GroupRecord(identifier=GROUP, created_at=time.time()))
    claimed = ledger.claim(names.AGENT_QUEUE, job_id=placement.id)
    assert claimed is not None
    ledger.finish(claimed, result={})
    ledger.groups.start_epoch(GROUP, [Share(agent="agent", slots=1, host="host")])
    yield ledger
    ledger.client.close()


def submit(ledger: Ledger, count: int = 1) -> list[str]:
    return [ledger.submit(job())[0].id for _ in range(count)]


def claim(ledger: Ledger, epoch: int = 1) -> JobRecord | None:
    return ledger.claim(QUEUE, identifier=GROUP, epoch=epoch)


def test_the_same_key_gives_the_first_job_again_and_other_content_is_refused(
    ledger: Ledger,
) -> None:
    first, replayed = ledger.submit(job(key="k"))
    again, replayed_again = ledger.submit(job(key="k"))

    assert (replayed, replayed_again, again.id) == (False, True, first.id)
    with pytest.raises(ServiceError, match="IDEMPOTENCY_MISMATCH"):
        ledger.submit(job(key="k", fingerprint="other"))


def test_many_clients_with_one_key_make_one_job(ledger: Ledger) -> None:
    start, ids = threading.Barrier(8), []

    def run() -> None:
        start.wait()
        ids.append(ledger.submit(job(key="one"))[0].id)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(set(ids)) == 1
    assert ledger.queue_length(QUEUE) == 1


def test_jobs_are_claimed_in_order_and_one_at_a_time(ledger: Ledger) -> None:
    ids = submit(ledger, 3)

    ran = []
    while (claimed := claim(ledger)) is not None:
        assert claim(ledger) is None, "a second claim while one runs"
        ran.append(claimed.id)
        ledger.finish(claimed, epoch=1, seq=len(ran))

    assert ran == ids


def test_a_held_operation_at_the_head_stays_until_it_is_no_longer_held(ledger: Ledger) -> None:
    """The claim itself looks, so that none submitted a moment before slips through; what waits
    behind keeps its place."""
    load = ledger.submit(job("load_checkpoint"))[0]
    ledger.submit(job("update_actor"))
    holding = partial(
        ledger.claim, QUEUE, identifier=GROUP, epoch=1, held=("barrier", "load_checkpoint")
    )

    assert holding() is None
    assert ledger.require_job(load.id).state == "queued"
    claimed = claim(ledger)
    assert claimed is not None and claimed.id == load.id
    ledger.finish(claimed, epoch=1)
    following = holding()
    assert following is not None and following.operation == "update_actor"


def test_a_replaced_incarnation_can_neither_claim_nor_finish(ledger: Ledger) -> None:
    submit(ledger, 2)
    claimed = claim(ledger)
    assert claimed is not None

    ledger.groups.start_epoch(GROUP, [Share(agent="agent", slots=1, host="host")])

    with pytest.raises(Fenced):
        ledger.finish(claimed, epoch=1, result={})
    with pytest.raises(Fenced):
        claim(ledger, epoch=1)


def test_finishing_twice_is_harmless_and_finishing_otherwise_is_refused(ledger: Ledger) -> None:
    submit(ledger)
    claimed = claim(ledger)
    assert claimed is not None

    ledger.finish(claimed, epoch=1, result={"x": 1})
    ledger.finish(claimed, epoch=1, result={"x": 1})

    with pytest.raises(Fenced):
        ledger.finish(claimed, epoch=1, error={"code": "INTERNAL"})
    record = ledger.job(claimed.id)
    assert record is not None
    assert (record.state, record.result) == ("finished", {"x": 1})


def test_a_queued_job_can_be_cancelled_and_a_running_one_cannot(ledger: Ledger) -> None:
    running, queued = submit(ledger, 2)
    claimed = claim(ledger)
    assert claimed is not None

    assert [ledger.cancel(queued).state for _ in range(2)] == ["cancelled", "cancelled"], (
        "a retry is harmless"
    )
    with pytest.raises(ServiceError, match="JOB_RUNNING"):
        ledger.cancel(running)
    ledger.finish(claimed, epoch=1)
    with pytest.raises(ServiceError, match="JOB_FINAL"):
        ledger.cancel(running)


def test_a_group_that_goes_down_fails_every_job_with_the_cause(ledger: Ledger) -> None:
    running, queued = submit(ledger, 2)
    claim(ledger)

    ledger.groups.mark_down(GROUP, 1, "rank 1: out of memory", rank=1)

    group = ledger.groups.get(GROUP)
    assert group is not None
    assert (group.state, group.cause) == ("down", "rank 1: out of memory")
    codes = {
        job_id: (ledger.require_job(job_id).error or {})["code"] for job_id in (running, queued)
    }
    assert codes == {running: "OPERATION_FAILED", queued: "GROUP_DOWN"}
    assert ledger.queue_length(QUEUE) == 0


def test_what_a_group_that_was_taken_for_lost_still_says_changes_nothing(ledger: Ledger) -> None:
    """Its host was cut off and comes back: a save whose failure was told does not go on, and the
    group is not alive again."""
    submit(ledger)
    saved = claim(ledger)
    assert saved is not None
    ledger.groups.mark_down(GROUP, 1, "its agent has not been heard")

    with pytest.raises(Fenced):
        ledger.hand_over(saved, names.CHECKPOINT_QUEUE, epoch=1, params={})
    with pytest.raises(Fenced):
        ledger.groups.update(GROUP, 1, state="ready")
    ledger.groups.mark_destroyed(GROUP, 1)
    with pytest.raises(Fenced):
        ledger.groups.update(GROUP, 1, state="starting")

    assert ledger.require_job(saved.id).state == "failed"
    assert ledger.queue_length(names.CHECKPOINT_QUEUE) == 0
    group = ledger.groups.get(GROUP)
    assert group is not None
    assert group.state == "destroyed"


def test_what_was_lost_with_the_weights_is_marked_rolled_back(ledger: Ledger) -> None:
    ids = submit(ledger, 3)
    for seq in (1, 2, 3):
        claimed = claim(ledger)
        assert claimed is not None
        ledger.finish(claimed, epoch=1, seq=seq)

    assert ledger.groups.roll_back(GROUP, 1, 1) == 2
    assert [ledger.require_job(job_id).state for job_id in ids] == [
        "finished",
        "rolled_back",
        "rolled_back",
    ]


def test_a_destroyed_group_takes_nothing_more_and_stays_destroyed(ledger: Ledger) -> None:
    """Its destroy is finished with it: left behind, it would stand before every job of the next
    group of that name."""
    destroy, _ = ledger.submit(job("destroy"))
    claim(ledger)

    ledger.groups.mark_destroyed(GROUP, 1)

    assert ledger.require_job(destroy.id).state == "finished"
    assert ledger.queue_length(QUEUE) == 0
    with pytest.raises(Fenced):
        claim(ledger)
    with pytest.raises(Fenced):
        ledger.groups.mark_down(GROUP, 1, "rank 0 was killed")
    group = ledger.groups.get(GROUP)
    assert group is not None
    assert group.state == "destroyed"


def test_a_destroy_that_waits_for_a_group_that_goes_down_has_what_it_asks_for(
    ledger: Ledger,
) -> None:
    """Whoever reports the end need not have seen it: it may have been submitted a moment before."""
    submit(ledger)
    running = claim(ledger)
    destroy, _ = ledger.submit(job("destroy"))

    ledger.groups.mark_down(GROUP, 1, "rank 0 was killed")

    assert running is not None
    assert "rank 0 was killed" in (ledger.require_job(running.id).error or {})["message"]
    assert ledger.require_job(destroy.id).state == "finished"
    group = ledger.groups.get(GROUP)
    assert group is not None
    assert (group.state, ledger.groups.identifiers(), ledger.queue_length(QUEUE)) == (
        "destroyed",
        [],
        0,
    )


def test_epochs_go_on_when_a_name_is_used_again(ledger: Ledger) -> None:
    """What the former group's processes still write is fenced off."""
    ledger.groups.mark_destroyed(GROUP, 1)
    ledger.submit(
        job("initialize_worker", queue=names.AGENT_QUEUE),
        group=GroupRecord(identifier=GROUP, created_at=time.time()),
    )

    assert ledger.groups.start_epoch(GROUP, [Share(agent="agent", slots=1, host="host")]) > 1
    for late in (ledger.groups.mark_destroyed, ledger.groups.update):
        with pytest.raises(Fenced):
            late(GROUP, 1)


def test_a_save_that_waits_for_the_checkpointer_cannot_be_cancelled(ledger: Ledger) -> None:
    """It has run by half: what the ranks wrote would stay in staging."""
    submit(ledger)
    saved = claim(ledger)
    assert saved is not None
    ledger.hand_over(saved, names.CHECKPOINT_QUEUE, epoch=1, params={})

    with pytest.raises(ServiceError, match="JOB_RUNNING"):
        ledger.cancel(saved.id)


def test_a_full_queue_is_refused_until_there_is_room(ledger: Ledger) -> None:
    submit(ledger, 64)

    with pytest.raises(ServiceError, match="TOO_MANY_QUEUED"):
        submit(ledger)


def test_an_old_unknown_job_is_expired_and_a_young_one_unknown(ledger: Ledger) -> None:
    old = f"{int((time.time() - 2 * 86400) * 1000):012x}7{'0' * 19}"

    with pytest.raises(ServiceError, match="EXPIRED"):
        ledger.require_job(old)
    with pytest.raises(ServiceError, match="JOB_NOT_FOUND"):
        ledger.require_job(names.new_job_id())


class Group:
    """A consumer as rank 0 is one, in a thread: it counts what it runs."""

    def __init__(self, url: str) -> None:
        self.ran: list[str] = []
        self._ledger = Ledger(connect(url))
        self._consumer = QueueConsumer(url, QUEUE, name="group", on_wake=self._drain)
        self._thread = threading.Thread(target=self._consumer.run, daemon=True)

    def __enter__(self) -> Group:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.stop()
        self._thread.join(5)

    def _drain(self) -> None:
        while (claimed := self._ledger.claim(QUEUE, identifier=GROUP, epoch=1)) is not None:
            self.ran.append(claimed.id)
            self._ledger.finish(claimed, epoch=1)


def test_with_the_wake_up_deleted_by_hand_a_job_still_runs_within_five_seconds(
    ledger: Ledger, redis_url: str
) -> None:
    (job_id,) = submit(ledger)
    ledger.client.delete(f"rq:queue:{QUEUE}", f"rq:job:{job_id}-run")

    with Group(redis_url) as group:
        wait_until(lambda: group.ran == [job_id], 5)


def test_with_the_wake_up_tripled_a_job_runs_once(ledger: Ledger, redis_url: str) -> None:
    (job_id,) = submit(ledger)
    ledger.client.rpush(f"rq:queue:{QUEUE}", *[f"{job_id}-run"] * 2)

    with Group(redis_url) as group:
        wait_until(lambda: ledger.client.llen(f"rq:queue:{QUEUE}") == 0 and bool(group.ran), 5)

    assert group.ran == [job_id]


def test_a_job_hash_that_names_other_code_is_refused_and_the_group_goes_on(
    ledger: Ledger, redis_url: str
) -> None:
    for serializer in ("json", "pickle"):
        rq.Queue(QUEUE, connection=connect(redis_url, decode=False), serializer=serializer).enqueue(
            "os.mkdir", "pwned"
        )
    (job_id,) = submit(ledger)

    with Group(redis_url) as group:
        wait_until(lambda: group.ran == [job_id], 5)


def test_ended_jobs_leave_no_key_without_an_expiry(ledger: Ledger, redis_url: str) -> None:
    ids = submit(ledger, 3)
    with Group(redis_url) as group:
        wait_until(lambda: group.ran == ids, 5)
    ledger.groups.mark_destroyed(GROUP, 1)

    lasting = {key for key in ledger.client.keys("*") if ledger.client.ttl(key) == -1}

    assert lasting <= {
        "nexrl:order",
        "nexrl:jobs",
        "rq:queues",
        "rq:workers",
        "rq:queue:agents",
        "nexrl:applied:student",
    }


def test_names_of_consumers_that_died_are_forgotten(ledger: Ledger, redis_url: str) -> None:
    """One that was killed signs off nowhere; the next one of its queue drops its name from RQ's two
    lists."""
    lists = "rq:workers", f"rq:workers:{QUEUE}"
    for each in lists:
        ledger.client.sadd(each, "rq:worker:killed")

    with Group(redis_url):
        wait_until(
            lambda: not any(ledger.client.sismember(each, "rq:worker:killed") for each in lists), 5
        )

        assert all(ledger.client.scard(each) == 1 for each in lists)


def test_a_record_stays_small(ledger: Ledger) -> None:
    """At most 8 KB an operation while RQ's own record lives, 2 KB after."""
    (job_id,) = submit(ledger)

    ours = ledger.client.memory_usage(names.job_key(job_id)) or 0
    theirs = ledger.client.memory_usage(f"rq:job:{job_id}-run") or 0

    assert ours <= 2048
    assert ours + theirs <= 8192
