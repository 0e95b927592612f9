"""The gateway as a process: what it imports, what it holds in memory, and what happens when others
die."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from nexrl_contract import names
from nexrl_contract.names import AGENT_QUEUE, JANITOR_KEY
from nexrl_contract.records import ProcessRecord
from nexrl_gateway.services import Services
from nexrl_gateway.settings import Settings
from nexrl_gateway.upkeep import sweep
from nexrl_ledger import Ledger, connect
from nexrl_payloads import open_store

from tests.helpers.gateway import (
    ASYNC,
    FRAME,
    B,
    Gateway,
    PlayedGroup,
    R,
    forget_peak,
    frame,
    memory_peak,
    put_parts,
    refusal,
    slowest_health,
)
from tests.helpers.servers import RedisServer, wait_until

MIB = 1024**2


class BigFrame:
    """A frame of one tensor that is never in memory as a whole; requests sends it with its
    length."""

    def __init__(self, nbytes: int) -> None:
        rows = nbytes // 8 // 4096
        self._rows = rows
        entry = {
            "input_ids": {"dtype": "I64", "shape": [rows, 4096], "data_offsets": [0, rows * 32768]}
        }
        text = json.dumps(entry).encode()
        self._head = len(text).to_bytes(8, "little") + text

    def __len__(self) -> int:
        return len(self._head) + self._rows * 32768

    def __iter__(self) -> Iterator[bytes]:
        yield self._head
        piece = bytes(32768)
        for _ in range(self._rows):
            yield piece


def upload(gateway: Gateway, nbytes: int) -> None:
    response = gateway.post("/compute_log_prob", data=BigFrame(nbytes), headers={**FRAME, **ASYNC})
    assert response.status_code == 202, response.text


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_whatever_is_uploaded(gateway: Gateway, group: PlayedGroup) -> None:
    """One upload of 256 MiB costs at most 16 MiB, four at once at most 64 MiB; /health answers all
    the while."""
    upload(gateway, MIB)
    gateway.get("/health")
    pid = gateway.process.pid
    for count, nbytes, limit in ((1, 256 * MIB, 16 * MIB), (4, 64 * MIB, 64 * MIB)):
        forget_peak(pid)
        before = memory_peak(pid)

        def work(count: int = count, nbytes: int = nbytes) -> None:
            with ThreadPoolExecutor(count) as pool:
                list(pool.map(lambda _: upload(gateway, nbytes), range(count)))

        slow = slowest_health(gateway, work)
        assert memory_peak(pid) - before <= limit
        assert slow < 0.5  # 0.1 on a machine that does nothing else; the bench measures that
    assert sum(path.stat().st_size for path in gateway.payloads.iterdir()) > 512 * MIB


def test_the_gateway_needs_no_torch_and_no_numpy() -> None:
    """Its image carries neither, and the other services not at all."""
    program = (
        "import nexrl_gateway.app, nexrl_gateway.__main__, nexrl_payloads.redis_store, sys, json;"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    loaded = set(json.loads(out))
    assert not loaded & {
        "torch",
        "numpy",
        "transformers",
        "nexrl_worker",
        "nexrl_checkpointer",
        "nexrl_client",
        "nexrl_stack",
    }


def test_redis_away_is_503_in_time_and_comes_back(tmp_path: Path) -> None:
    """503 with Retry-After within three seconds, whoever waits included; afterwards all goes on as
    before."""
    server = RedisServer(tmp_path)
    server.start()
    gateway = Gateway(tmp_path / "gateway", server.url)
    ledger = Ledger(connect(server.url))
    try:
        group = PlayedGroup(ledger, gateway.payloads)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(lambda: gateway.post("/barrier"))
            wait_until(group.waiting, 5, "the job")
            server.kill()
            started = time.monotonic()
            for method, path in (("POST", "/barrier"), ("GET", "/jobs"), ("GET", "/get_models")):
                refusal(gateway.call(method, path), 503, "REDIS_UNAVAILABLE")
            refusal(
                gateway.post("/update_actor", data=frame(), headers=FRAME), 503, "REDIS_UNAVAILABLE"
            )
            for path in ("/health", "/ready"):
                report = gateway.get(path)
                assert (report.status_code, report.json()["redis"]) == (503, "unavailable")
                assert int(report.headers["Retry-After"]) > 0
            refusal(waiting.result(), 503, "REDIS_UNAVAILABLE")
            assert time.monotonic() - started < 5
        assert gateway.stored() == []
        server.start()
        assert gateway.get("/ready").status_code == 200
        with group.working(lambda job: {"result": {}}):
            started = time.monotonic()
            assert gateway.post("/barrier").status_code == 200
        with ThreadPoolExecutor(1) as pool:
            poll = pool.submit(lambda: gateway.post("/barrier"))
            wait_until(group.waiting, 5, "the job")
            time.sleep(0.8)
            group.run_next(result={})
            assert poll.result().status_code == 200
    finally:
        gateway.stop()
        ledger.client.close()
        server.kill()


def test_a_stopping_gateway_answers_those_who_wait(
    gateway: Gateway, group: PlayedGroup, redis_url: str, tmp_path: Path
) -> None:
    """SIGTERM: who waits hears that the job goes on, the process ends with 0, and another gateway
    knows the job."""
    first = Gateway(tmp_path, redis_url)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: first.post("/barrier"))
        wait_until(group.waiting, 5, "the job")
        time.sleep(0.2)
        started = time.monotonic()
        assert first.stop() == 0
        assert time.monotonic() - started < 5
        error = refusal(waiting.result(), 504, "WAIT_LIMIT")
    group.run_next(result={})
    assert gateway.get(f"/jobs/{error['job_id']}").json()["state"] == "finished"


def test_roots_are_as_configured(redis_url: str, tmp_path: Path) -> None:
    """Further checkpoint roots are allowed by absolute path; with model roots, models elsewhere are
    refused."""
    for name in ("models/tiny", "elsewhere/tiny", "more"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    gateway = Gateway(
        tmp_path / "gateway",
        redis_url,
        NEXRL_MODEL_ROOTS=str(tmp_path / "models"),
        NEXRL_CHECKPOINT_ROOTS=str(tmp_path / "more"),
        NEXRL_PAYLOADS=redis_url.replace("/0", "/1"),
    )
    ledger = Ledger(connect(redis_url))
    try:
        group = PlayedGroup(ledger, gateway.payloads)
        more = {"path": str(tmp_path / "more" / "step_1")}
        assert gateway.post("/load_checkpoint", json=more, headers=ASYNC).status_code == 202
        assert group.run_next(result={}).params["path"] == more["path"]
        elsewhere = {"actor": {"model": {"path": str(tmp_path / "elsewhere" / "tiny")}}}
        body = {"config_dict": elsewhere, "world_size": 1}
        error = refusal(gateway.post("/initialize?identifier=x", json=body), 422, "PATH_REFUSED")
        assert "--model-root" in error["message"] and "NEXRL_MODELS" in error["message"]
        elsewhere["actor"]["model"]["path"] = "Qwen/tiny"
        error = refusal(gateway.post("/initialize?identifier=x", json=body), 422, "INVALID_CONFIG")
        assert (
            "below the first model root" in error["message"]
            and "hf download Qwen/tiny" in error["message"]
        )
        elsewhere["actor"]["model"]["path"] = "tiny"
        refusal(
            gateway.post("/initialize?identifier=x", json=body), 503, "GROUP_DOWN"
        )  # the path is fine, no agent is there
        ledger.agents.beat(ProcessRecord(name="agent", slots=1, free=1))
        accepted = gateway.post("/initialize?identifier=x", json=body, headers=ASYNC).json()
        job = wait_until(lambda: ledger.claim(AGENT_QUEUE), 5, "the placement job")
        ledger.finish(job, result={})
        answer = gateway.get(f"/jobs/{accepted['id']}/result").json()
        assert answer["paths"] == {"actor.model.path": str(tmp_path / "models" / "tiny")}
        ledger.groups.mark_destroyed("x", None)
        job_id = gateway.post("/compute_log_prob", data=frame(), headers={**FRAME, **ASYNC}).json()[
            "id"
        ]
        stored = open_store(redis_url.replace("/0", "/1"))
        assert b"".join(stored.stream(job_id)) == frame()
    finally:
        gateway.stop()
        ledger.client.close()


def test_a_bad_setting_is_named(redis_url: str) -> None:
    """The process ends at once and says which variable."""
    environment = {"NEXRL_PORT": "eighty", "PATH": "/usr/bin", "PYTHONPATH": ":".join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-m", "nexrl_gateway"], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert "NEXRL_PORT" in ended.stderr


@pytest.fixture
def swept_gateway(redis_url: str, tmp_path: Path) -> Iterator[Gateway]:
    """A gateway on a database of its own, whose janitor has just swept and comes back in a minute;
    the shared one's never comes."""
    url = redis_url.replace("/0", "/1")
    gateway = Gateway(tmp_path, url)
    with connect(url) as client:
        wait_until(lambda: client.delete(JANITOR_KEY), 5, "the first sweep")
        yield gateway
    gateway.stop()


def test_the_janitor_spares_what_is_in_use(swept_gateway: Gateway, redis_url: str) -> None:
    """Abandoned payloads go, a queued job's payload stays however old it is; two replicas never
    sweep at once."""
    gateway, url = swept_gateway, redis_url.replace("/0", "/1")
    ledger = Ledger(connect(url))
    PlayedGroup(ledger, gateway.payloads)
    job_id = gateway.post("/compute_log_prob", data=frame(), headers={**FRAME, **ASYNC}).json()[
        "id"
    ]
    (gateway.payloads / "abandoned").write_bytes(b"x")
    (gateway.payloads / "fresh").write_bytes(b"x")
    long_ago = time.time() - 2 * 24 * 3600
    for name in (job_id, "abandoned"):
        os.utime(gateway.payloads / name, (long_ago, long_ago))

    async def sweep_twice() -> list[list[str]]:
        services = Services.start(
            Settings(data=gateway.data, payloads=f"file://{gateway.payloads}", redis_url=url)
        )
        try:
            return [
                await asyncio.to_thread(sweep, services.settings, services.ledger, services.store)
                for _ in range(2)
            ]
        finally:
            await services.close()

    assert asyncio.run(sweep_twice()) == [["abandoned"], []]
    assert gateway.stored() == sorted([job_id, "fresh"])
    ledger.client.close()


@pytest.fixture
def forgetful_gateway(redis_url: str, tmp_path: Path) -> Iterator[Gateway]:
    """A gateway on a database of its own that keeps everything for seconds only, and no more than
    two jobs."""
    kept = {
        f"NEXRL_{name}": "2"
        for name in ("RESULT_KEPT_S", "UPLOAD_KEPT_S", "JOBS_KEPT", "JOBS_KEPT_S")
    }
    gateway = Gateway(tmp_path, redis_url.replace("/0", "/1"), **kept)
    yield gateway
    gateway.stop()


def test_what_finished_work_leaves_is_gone_after_a_while(
    forgetful_gateway: Gateway, redis_url: str
) -> None:
    """A result goes some time after it was fetched, and not before; jobs are few; a killed client's
    upload goes, while one that makes progress stays however long it takes."""
    gateway = forgetful_gateway
    ledger = Ledger(connect(redis_url.replace("/0", "/1")))
    group = PlayedGroup(ledger, gateway.payloads)
    log_probs = {"old_log_probs": np.zeros((B, R), np.float32)}
    ids = []
    for _ in range(5):
        ids.append(
            gateway.post("/compute_log_prob", data=frame(), headers={**FRAME, **ASYNC}).json()["id"]
        )
        group.run_next(tensors=log_probs)
    put_parts(gateway, frame()[:200], 100, payload="a" * 32)
    assert (
        gateway.get(f"/jobs/{ids[4]}/result", headers={"Accept": names.FRAME_TYPE}).status_code
        == 200
    )
    assert gateway.get(f"/jobs/{ids[4]}/result").status_code == 200, "a lost answer is given again"

    for number in range(8):
        time.sleep(0.7)
        put_parts(gateway, bytes(100 * (number + 1)), 100, payload="b" * 32)
    assert gateway.get(f"/payloads/{'b' * 32}").json()["parts"] == list(range(8))

    wait_until(
        lambda: gateway.stored() == [f".parts-{'b' * 32}", f"{ids[3]}.result"], 15, "the janitor"
    )
    refusal(gateway.get(f"/jobs/{ids[4]}/result"), 410, "EXPIRED")
    assert gateway.get(f"/jobs/{ids[4]}").json()["state"] == "finished"
    assert gateway.get(f"/jobs/{ids[3]}/result").status_code == 200
    refusal(gateway.get(f"/jobs/{ids[0]}"), 410, "EXPIRED")
    ledger.client.close()
