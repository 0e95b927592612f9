"""Our client at a real gateway: forked, awaited, by way of a proxy, and refused at once where
waiting is no use."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nexrl_client import (
    GroupDown,
    HTTPTrainServiceClient,
    InvalidAnswer,
    JobHandle,
    ServiceTimeout,
    Unavailable,
    Unreachable,
)
from nexrl_contract import names
from nexrl_contract.records import JobRecord, ProcessRecord
from nexrl_ledger import Ledger

from tests.helpers.gateway import Gateway, PlayedGroup, tensors
from tests.helpers.proxy import little_proxy
from tests.helpers.servers import free_port, wait_until

B, S, R = 4, 8, 3
CALLS, CHILDREN, THREADS = 15, 4, 3


@pytest.fixture
def client(gateway: Gateway, group: PlayedGroup) -> Iterator[HTTPTrainServiceClient]:
    with HTTPTrainServiceClient(gateway.url, group.identifier, request_timeout=30) as made:
        yield made


@pytest.fixture
def answering(group: PlayedGroup) -> Iterator[PlayedGroup]:
    """A group whose log-probabilities are the tokens themselves: an answer tells who asked."""

    def own_rows(job: JobRecord) -> dict[str, Any]:
        if job.payload is None:
            return {"result": {}}
        with group.store.open(job.payload.id) as payload:
            ids = np.array(payload.torch("input_ids").numpy())
        return {"tensors": {"old_log_probs": ids[:, -R:].astype(np.float32)}}

    with group.working(own_rows):
        yield group


def asked_by(who: int, number: int = 0) -> dict[str, Any]:
    return tensors(input_ids=np.full((B, S), 1000 * who + number, np.int64))


def check(result: dict[str, Any], who: int, number: int = 0) -> None:
    found = np.asarray(result["batch"]["old_log_probs"])
    assert found.shape == (B, R) and (found == 1000 * who + number).all(), (
        f"{who}.{number} got {found[0, 0]}"
    )


def call_often(client: HTTPTrainServiceClient, who: int, wrong: list[str]) -> None:
    try:
        for number in range(CALLS):
            check(client.compute_log_prob(asked_by(who, number)), who, number)
    except Exception as error:
        wrong.append(f"{who}: {error!r}")


def child(client: HTTPTrainServiceClient, who: int, before: JobHandle, report: Path) -> None:
    """What a forked process does with what it has inherited."""
    wrong: list[str] = []
    try:
        check(before.result(20), 99)
        job = client.submit("compute_log_prob", asked_by(who))
        check(job.result(20), who)
    except Exception as error:
        wrong.append(repr(error))
    call_often(client, who, wrong)
    report.write_text("\n".join(wrong) or "right")


def test_a_client_that_was_used_before_fork_gives_every_process_its_own_results(
    client: HTTPTrainServiceClient, answering: PlayedGroup, tmp_path: Path
) -> None:
    """Parent and children call at once, threads of the parent even while it forks; a handle made
    before goes on in all."""
    before = client.submit("compute_log_prob", asked_by(99))
    wrong: list[str] = []
    threads = [
        threading.Thread(target=call_often, args=(client, who, wrong)) for who in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    check(client.compute_log_prob(asked_by(50)), 50)
    reports = [tmp_path / f"{who}.txt" for who in range(10, 10 + CHILDREN)]
    fork = multiprocessing.get_context("fork")
    children = [
        fork.Process(target=child, args=(client, who, before, report))
        for who, report in enumerate(reports, start=10)
    ]
    for process in children:
        process.start()
    call_often(client, 60, wrong)
    for process in children:
        process.join(60)
        assert process.exitcode == 0
    for thread in threads:
        thread.join()
    check(before.result(20), 99)

    assert wrong == []
    assert {report.read_text() for report in reports} == {"right"}
    keys = [job.key for job in answering.ledger.jobs(limit=1000) if job.key]
    assert len(keys) == len(set(keys)) == CALLS * (THREADS + CHILDREN + 1) + CHILDREN + 2


def test_an_answer_repeats_the_mark_of_its_request_and_is_kept_by_no_cache(
    gateway: Gateway, ledger: Ledger
) -> None:
    """Whatever the answer is; a request without one gets none, and a long one is not repeated."""
    for path in ("/health", "/nowhere", "/jobs/x", "/jobs?limit=0", "/openapi.json"):
        answer = gateway.get(path, headers={names.REQUEST_ID_HEADER: f"mark of {path}"})
        assert answer.headers[names.REQUEST_ID_HEADER] == f"mark of {path}"
        assert answer.headers["Cache-Control"] == "no-store"
        assert names.REQUEST_ID_HEADER not in gateway.get(path).headers
    assert (
        names.REQUEST_ID_HEADER
        not in gateway.get("/health", headers={names.REQUEST_ID_HEADER: "x" * 129}).headers
    )


async def pulse(beats: list[float]) -> None:
    while True:
        beats.append(time.monotonic())
        await asyncio.sleep(0.01)


def test_a_hundred_results_are_awaited_at_once_while_the_event_loop_goes_on(
    client: HTTPTrainServiceClient, group: PlayedGroup
) -> None:
    """More than a pool of threads has; each is there as soon as its own job has ended, in whatever
    order."""

    async def trainer() -> None:
        beats: list[float] = []
        beating = asyncio.create_task(pulse(beats))
        jobs = [
            await client.submit_async("compute_log_prob", asked_by(number)) for number in range(50)
        ]
        awaited = [asyncio.create_task(job.result_async(60)) for job in jobs * 2]
        await asyncio.sleep(1.5)  # they are all being waited for now
        assert not any(task.done() for task in awaited)
        for number in range(50):
            ids = np.full((B, R), 1000 * number, np.float32)
            await asyncio.to_thread(group.run_next, tensors={"old_log_probs": ids})
        for number, result in enumerate(await asyncio.gather(*awaited)):
            check(result, number % 50)
        beating.cancel()
        assert np.diff(beats).max() < 1.0

    asyncio.run(trainer())


def test_a_cancelled_await_leaves_the_job_and_its_handle(
    client: HTTPTrainServiceClient, group: PlayedGroup
) -> None:
    """Nor does it hold the program up; a time-out names the job; an error of the job is raised as
    result() raises it."""

    async def give_up() -> JobHandle:
        job = await client.submit_async("compute_log_prob", asked_by(7))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(job.result_async(), 0.2)
        with pytest.raises(ServiceTimeout) as late:
            await job.result_async(timeout=0.2)
        assert late.value.job is job
        return job

    start = time.monotonic()
    job = asyncio.run(give_up())
    assert time.monotonic() - start < 10
    assert job.status()["state"] == "queued"
    group.run_next(tensors={"old_log_probs": np.full((B, R), 7000, np.float32)})
    check(asyncio.run(job.result_async()), 7)
    check(job.result(), 7)
    failing = client.submit("barrier")
    group.run_next(error={"code": "OPERATION_FAILED", "message": "boom"})
    with pytest.raises(Exception, match="boom"):
        asyncio.run(failing.result_async())


def test_a_group_that_is_down_is_said_at_once_and_one_that_restarts_is_waited_for(
    gateway: Gateway,
    client: HTTPTrainServiceClient,
    group: PlayedGroup,
    ledger: Ledger,
    make_group: Callable[..., PlayedGroup],
) -> None:
    """With what to do; of the calls that wait when it goes down, each ends with the cause."""
    waiting = client.submit("compute_log_prob", asked_by(1))
    errors: list[Exception] = []

    def blocked() -> None:
        try:
            client.barrier()
        except GroupDown as error:
            errors.append(error)

    thread = threading.Thread(target=blocked)
    thread.start()
    wait_until(lambda: group.waiting() == 2)
    start = time.monotonic()
    ledger.groups.mark_down("student", 1, "rank 0 was killed")
    thread.join(20)
    assert "rank 0 was killed" in str(errors[0])
    for call in (waiting.result, client.barrier, lambda: client.update_actor(asked_by(2))):
        with pytest.raises(GroupDown, match="rank 0 was killed") as caught:
            call()
        assert caught.value.details["retryable"] is False
    assert "destroy and initialize" in str(caught.value)
    assert time.monotonic() - start < 10

    restarted = make_group("restarted", state="starting")
    back = threading.Timer(1.0, lambda: ledger.groups.update("restarted", state="ready"))
    back.start()
    with HTTPTrainServiceClient(gateway.url, "restarted") as other:
        job = other.submit("barrier")
        restarted.run_next(result={})
        assert job.result(20)["status"] == "success"
    back.join()


def test_a_time_out_says_what_the_job_waits_for(
    client: HTTPTrainServiceClient, group: PlayedGroup, ledger: Ledger
) -> None:
    """Other operations, the group itself, or an agent that may have died."""
    first, second = client.submit("barrier"), client.submit("barrier")
    with pytest.raises(
        ServiceTimeout, match="it waits for 1 operation ahead of it in train:student"
    ):
        second.result(0.1)
    with pytest.raises(ServiceTimeout, match="it waits for the consumer of train:student"):
        first.result(0.1)
    ledger.groups.update("student", placement=[{"agent": "gone", "slots": 1}])
    with pytest.raises(ServiceTimeout, match="it waits for agent gone, which is not heard"):
        first.result(0.1)


@pytest.mark.slow
def test_without_an_agent_initialize_waits_only_for_a_stack_that_has_just_started(
    ledger: Ledger, redis_url: str, tmp_path: Path
) -> None:
    """Afterwards the answer comes at once and says how to start one; in the first seconds an agent
    may still come.

    So does that of a group that was to be placed when the last agent went; it is placed when one
    comes.
    """
    (tmp_path / "config.json").write_text("{}")
    config = {"actor": {"model": {"path": str(tmp_path)}}}
    ledger.agents.sign_off("agent")
    young = Gateway(tmp_path / "young", redis_url)
    try:
        with HTTPTrainServiceClient(young.url, "student") as client:
            start = time.monotonic()
            with pytest.raises(
                GroupDown, match=r"no worker agent is alive; start one .*nexrl up"
            ) as caught:
                client.initialize_worker(config_dict=config, world_size=1)
            assert caught.value.details["retryable"] is False
            assert 1 < time.monotonic() - start < 60
            start = time.monotonic()
            with pytest.raises(GroupDown, match="no worker agent is alive"):
                client.initialize_worker(config_dict=config, world_size=1)
            assert time.monotonic() - start < 5
            ledger.agents.beat(ProcessRecord(name="agent", slots=4, free=4))
            placed = client.submit("initialize_worker", config_dict=config, world_size=1)
            ledger.agents.sign_off("agent")
            assert "a worker agent: none is alive" in placed.status()["waits_for"]
            with pytest.raises(GroupDown, match="no worker agent is alive") as caught:
                placed.result(1)
            assert caught.value.job is placed
            with pytest.raises(GroupDown, match="no worker agent is alive"):
                client.initialize_worker(config_dict=config, world_size=1)
            job = ledger.claim(names.AGENT_QUEUE)
            assert job is not None
            ledger.finish(job, result={})
            assert placed.result(5)["world_size"] == 1
    finally:
        young.stop()


def test_a_proxy_leads_to_a_gateway_elsewhere_and_its_own_answers_name_it(
    gateway: Gateway, answering: PlayedGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to this machine itself, whatever is set; its password is shown to nobody."""
    for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with little_proxy(gateway.url, tmp_path) as proxy:
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, proxy.url.replace("//", "//user:secret@"))
        port = gateway.url.rpartition(":")[2]
        for here in (gateway.url, f"http://localhost:{port}", f"http://LOCALHOST:{port}"):
            assert HTTPTrainServiceClient(here, "student").get_models()["count"] == 1
        assert proxy.asked == []
        with HTTPTrainServiceClient(
            "http://training.invalid:8000", "student", request_timeout=20
        ) as client:
            check(client.compute_log_prob(asked_by(3)), 3)
            assert set(proxy.asked) == {
                "http://training.invalid:8000/compute_log_prob?identifier=student"
            }
    dead = f"http://127.0.0.1:{free_port()}"
    with (
        little_proxy(dead, tmp_path) as proxy,
        HTTPTrainServiceClient("http://training.invalid:8000") as client,
    ):
        client.request_timeout = 1
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, proxy.url.replace("//", "//user:secret@"))
        with pytest.raises(
            Unavailable, match=f"the proxy {proxy.url}.* with 502 and text/html.*no route"
        ) as page:
            client.get_models()
        with pytest.raises(Unavailable, match=proxy.url):
            client.health_check()
        monkeypatch.setenv("https_proxy", proxy.url)
        with pytest.raises(
            InvalidAnswer,
            match=f"the proxy {proxy.url} refuses to lead to https://training.invalid",
        ):
            HTTPTrainServiceClient("https://training.invalid").get_models()
    with pytest.raises(Unreachable, match=f"by way of the proxy {proxy.url}") as gone:
        client = HTTPTrainServiceClient("http://training.invalid:8000", request_timeout=0.5)
        client.get_models()
    assert "secret" not in f"{page.value}{gone.value}"
