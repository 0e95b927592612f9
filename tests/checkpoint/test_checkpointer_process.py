"""The checkpointer as it runs: a process on a real Redis, killed, stopped, and fed bad saves."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nexrl_contract.names import CHECKPOINT_QUEUE, CHECKPOINTS_KEY, job_key
from nexrl_contract.records import JobRecord
from nexrl_host.processes import die_with_parent
from nexrl_ledger import Ledger, connect, drop_queue
from nexrl_storage.manifest import published

from tests.helpers.toy_checkpoints import (
    environment,
    eventually,
    hand_over,
    leftovers,
    loads,
    make_state,
)

Start = Callable[..., "subprocess.Popen[bytes]"]
OLD, NEW = make_state(1), make_state(2)
BIG, BIGGER = make_state(3, rows=1_500_000), make_state(4, rows=1_600_000)


@pytest.fixture
def ledger(redis_url: str) -> Ledger:
    return Ledger(connect(redis_url))


@pytest.fixture
def start(tmp_path: Path, redis_url: str) -> Iterator[Start]:
    """Starts checkpointers; what still runs at the end of the test is ended."""
    running: list[subprocess.Popen[bytes]] = []

    def begin(name: str = "one", url: str = redis_url) -> subprocess.Popen[bytes]:
        settings = {
            "NEXRL_REDIS_URL": url,
            "NEXRL_DATA": str(tmp_path),
            "NEXRL_CHECKPOINTER_NAME": name,
        }
        command = [sys.executable, "-m", "nexrl_checkpointer"]
        with open(tmp_path / f"{name}.log", "ab") as log:
            running.append(
                subprocess.Popen(
                    command, env=environment(**settings), stderr=log, preexec_fn=die_with_parent
                )
            )
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.wait()


def ended(ledger: Ledger, job: JobRecord) -> JobRecord:
    """The job's record once it has ended."""
    eventually(lambda: ledger.require_job(job.id).final)
    return ledger.require_job(job.id)


def let_leases_lapse(ledger: Ledger) -> None:
    """As if the 30 seconds of a dead checkpointer's lease had passed."""
    for job in ledger.waiting(CHECKPOINT_QUEUE):
        ledger.client.hset(job_key(job.id), "lease_at", "0")


def test_it_registers_publishes_and_signs_off(tmp_path: Path, ledger: Ledger, start: Start) -> None:
    """A save handed over becomes a checkpoint and a finished job; SIGTERM ends the process with 0
    and its record."""
    process = start("two-of-two")
    eventually(lambda: [record.name for record in ledger.checkpointers.heard()] == ["two-of-two"])
    job = ended(ledger, hand_over(ledger, tmp_path, tmp_path / "ckpt" / "step_1", NEW))
    assert job.state == "finished" and job.result is not None
    files = [path for path in (tmp_path / "ckpt" / "step_1").rglob("*") if path.is_file()]
    assert job.result == {
        "note": "from rank 0",
        "path": str(tmp_path / "ckpt" / "step_1"),
        "global_step": 1,
        "kind": "sharded",
        "nbytes": sum(path.stat().st_size for path in files if path.name != "manifest.json"),
        "world_size": 3,
    }
    assert loads(tmp_path / "ckpt" / "step_1", NEW) and leftovers(tmp_path) == []
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0 and ledger.checkpointers.heard() == []


def test_a_bad_save_fails_its_job_and_the_next_one_works(
    tmp_path: Path, ledger: Ledger, start: Start
) -> None:
    """The error has its code and names the job; staging is cleared; the process lives on."""
    start()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    refused = ended(ledger, hand_over(ledger, tmp_path, tmp_path / "photos", NEW))
    missing = ended(ledger, hand_over(ledger, tmp_path, tmp_path / "ckpt", NEW, world_size=4))
    stranger = ended(
        ledger, hand_over(ledger, tmp_path, tmp_path / "ckpt", NEW, staging=str(tmp_path))
    )
    assert [job.error and job.error["code"] for job in (refused, missing, stranger)] == [
        "PATH_REFUSED",
        "CHECKPOINT_INVALID",
        "INTERNAL",
    ]
    assert refused.error is not None and (refused.error["job_id"], refused.error["identifier"]) == (
        refused.id,
        "student",
    )
    assert [path.name for path in (tmp_path / ".nexrl" / "staging").iterdir()] == [stranger.id]
    assert ended(ledger, hand_over(ledger, tmp_path, tmp_path / "ckpt", NEW)).state == "finished"


def test_a_path_that_cannot_be_is_the_callers_error(
    tmp_path: Path, ledger: Ledger, start: Start
) -> None:
    """422 that names the path, nothing left behind, and the process lives on."""
    start()
    (tmp_path / "file").write_text("x")
    paths = [
        tmp_path / ("n" * 300),
        tmp_path / ("n" * 240),
        tmp_path / ("n" * 300) / "x",
        tmp_path / "file" / "x",
    ]
    for path in paths:
        error = ended(ledger, hand_over(ledger, tmp_path, path, NEW)).error
        assert (
            error is not None
            and error["code"] == "PATH_REFUSED"
            and str(path.parent) in error["message"]
        )
    assert not any(
        path.name.startswith((".n", "n")) and path.name != ".nexrl" for path in tmp_path.iterdir()
    )
    assert list((tmp_path / ".nexrl" / "staging").iterdir()) == []
    assert ended(ledger, hand_over(ledger, tmp_path, tmp_path / "ckpt", NEW)).state == "finished"


def test_the_record_of_a_destroyed_groups_checkpoints_goes(
    tmp_path: Path, ledger: Ledger, start: Start
) -> None:
    """Within moments, without another save."""
    start()
    ended(ledger, hand_over(ledger, tmp_path, tmp_path / "ckpt", NEW))
    assert ledger.client.hlen(CHECKPOINTS_KEY) == 1
    ledger.groups.mark_destroyed("student", None)
    eventually(lambda: ledger.client.hlen(CHECKPOINTS_KEY) == 0)


def test_a_lost_wake_up_delays_nothing(tmp_path: Path, ledger: Ledger, start: Start) -> None:
    """The ledger says what waits: with the wake-up deleted by hand the save is still published."""
    job = hand_over(ledger, tmp_path, tmp_path / "ckpt", NEW)
    drop_queue(ledger.client, CHECKPOINT_QUEUE)
    start()
    assert ended(ledger, job).state == "finished"


def test_saves_of_one_group_are_published_in_order(
    tmp_path: Path, ledger: Ledger, start: Start
) -> None:
    """With several checkpointers at work, only the last of many saves that remove their previous
    one is left."""
    for name in ("one", "two", "three"):
        start(name)
    jobs = [
        hand_over(
            ledger,
            tmp_path,
            tmp_path / "ckpt" / f"step_{step}",
            NEW,
            remove_previous=True,
            step=step,
        )
        for step in range(8)
    ]
    assert {ended(ledger, job).state for job in jobs} == {"finished"}
    assert [found.checkpoint.step for found in published([tmp_path / "ckpt"])] == [7]
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_killed_at_random_something_always_loads(
    tmp_path: Path, ledger: Ledger, start: Start
) -> None:
    """Kills -9 at random moments of a save: a whole checkpoint is visible each time, and the next
    process ends the job."""
    moments, path, large = random.Random(20), tmp_path / "ckpt", (BIG, BIGGER)
    process = start()
    job = hand_over(ledger, tmp_path, path, BIGGER)
    handed_over = time.monotonic()
    ended(ledger, job)
    took = time.monotonic() - handed_over
    interrupted = saves = 0
    while interrupted < 3 or saves < 10:
        assert saves < 50, f"only {interrupted} of {saves} kills met a save at work"
        job = hand_over(ledger, tmp_path, path, large[saves % 2])
        time.sleep(moments.uniform(0.0, took))
        process.kill()
        process.wait()
        interrupted += ledger.require_job(job.id).state == "running"
        assert loads(path, *large)
        let_leases_lapse(ledger)
        process = start()
        assert ended(ledger, job).state == "finished"
        assert loads(path, large[saves % 2]) and leftovers(tmp_path) == []
        saves += 1


def test_redis_away_for_a_while_is_waited_for(
    tmp_path: Path, start: Start, redis_server: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Started before Redis, and again after Redis was killed in between: the save is published."""
    server = type(redis_server)(tmp_path_factory.mktemp("own-redis"))  # type: ignore[call-arg]
    process = start(url=server.url)
    time.sleep(0.5)
    server.start()
    try:
        ledger = Ledger(connect(server.url))
        assert ended(ledger, hand_over(ledger, tmp_path, tmp_path / "one", NEW)).state == "finished"
        job = hand_over(ledger, tmp_path, tmp_path / "two", NEW)
        server.kill()
        time.sleep(0.5)
        server.start()
        let_leases_lapse(ledger)
        assert ended(ledger, job).state == "finished"
        assert process.poll() is None and ledger.client.hlen(CHECKPOINTS_KEY) == 1
    finally:
        server.kill()


def test_it_stops_even_while_redis_is_away(tmp_path: Path, start: Start) -> None:
    """SIGTERM is obeyed without a Redis."""
    process = start(url="redis://127.0.0.1:9/0")
    eventually(lambda: "checkpointer.started" in (tmp_path / "one.log").read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0


def test_it_finishes_the_save_at_hand_before_it_stops(
    tmp_path: Path, ledger: Ledger, start: Start
) -> None:
    """SIGTERM in the middle of a save: that one is published, the next one is left for others."""
    process = start()
    at_hand = hand_over(ledger, tmp_path, tmp_path / "ckpt" / "step_1", BIG)
    eventually(lambda: ledger.require_job(at_hand.id).state == "running")
    process.send_signal(signal.SIGTERM)
    left = hand_over(ledger, tmp_path, tmp_path / "ckpt" / "step_2", OLD)
    assert process.wait(30) == 0
    assert [ledger.require_job(job.id).state for job in (at_hand, left)] == ["finished", "queued"]


def test_the_process_holds_no_torch() -> None:
    """Importing the whole service brings neither torch nor NumPy nor another service."""
    code = (
        "import sys, nexrl_checkpointer.__main__;"
        "sys.exit(any(n.split('.')[0] in ('torch', 'numpy', 'fastapi', 'nexrl_worker', "
        "'nexrl_gateway') for n in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
