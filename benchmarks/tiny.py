"""A tiny operation through the whole stack: how long a barrier of one rank takes, and where the
time goes."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import psutil
import requests
from nexrl_client import HTTPTrainServiceClient
from nexrl_contract import names
from nexrl_contract.records import JobRecord
from nexrl_ledger import Ledger, connect, drop_queue

from benchmarks.processes import Children, free_port, listens, module
from benchmarks.results import Findings, Measure, Table, number
from benchmarks.stack import Stack, make_model

ROUNDS = 30
METHOD = (
    "client.barrier() on a group of one rank under nexrl up, and POST /echo on a FastAPI server "
    "with the gateway's "
    "event loop and parser, both over a kept connection of requests, in turns, in blocks of 30 "
    "with Redis' append-only "
    "file synced always and every second. Each block gives a median; the table shows the median "
    "of the blocks. Where "
    "the time goes: the client's clock, the times in the job's record, and the ledger's calls "
    "timed by themselves (under "
    "AOF always most of each is the disk)."
)
SYNCS = ("always", "everysec")


class _Call(NamedTuple):
    """Seconds since the epoch of one barrier's moments."""

    called: float
    created: float
    started: float
    finished: float
    answered: float


class _Block(NamedTuple):
    """Calls in turns: barriers, echoes, and the ledger's submit, claim and finish by themselves."""

    calls: list[_Call]
    echoes: list[float]
    alone: list[tuple[float, float, float]]

    @property
    def barrier_s(self) -> float:
        """Median seconds of a barrier."""
        return statistics.median(call.answered - call.called for call in self.calls)


def run(folder: Path, repetitions: int, *, quick: bool) -> Findings:
    """Blocks of both settings, in turns."""
    found = Findings("A tiny operation", METHOD)
    with Children(folder) as children:
        echo_port = free_port()
        echo = children.start("echo", module("benchmarks.echo", str(echo_port)))
        stack = Stack(children)
        model = make_model(folder / "model", **_SIZES)
        client = stack.group("tiny", model, 1)
        echo.until(lambda: listens(echo_port), "the echo server")
        _measure(found, stack, client, f"http://127.0.0.1:{echo_port}/echo", repetitions)
    return found


_SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def _measure(
    found: Findings, stack: Stack, client: HTTPTrainServiceClient, echo: str, repetitions: int
) -> None:
    redis = connect(_redis_url(stack))
    ledger = Ledger(redis)
    session = requests.Session()
    session.trust_env = False
    blocks: defaultdict[str, list[_Block]] = defaultdict(list)
    for repetition in range(-1, repetitions):  # the first one warms up
        for sync in SYNCS:
            redis.config_set("appendfsync", sync)
            block = _block(client, session, echo, ledger)
            if repetition >= 0:
                blocks[sync].append(block)
    always = [block.barrier_s * 1000 for block in blocks["always"]]
    found.measures.append(
        Measure.of("barrier, AOF always: p50", always, 40, at_least=False, unit="ms")
    )
    times = [block.barrier_s / statistics.median(block.echoes) for block in blocks["everysec"]]
    found.measures.append(
        Measure.of("barrier, AOF everysec, over HTTP echo: p50", times, 16, at_least=False)
    )
    found.tables.append(_where(blocks))


def _block(
    client: HTTPTrainServiceClient, session: requests.Session, echo: str, ledger: Ledger
) -> _Block:
    block = _Block([], [], [])
    for _ in range(ROUNDS):
        start = time.perf_counter()
        session.post(echo, json={"operation": "barrier"}, timeout=10).raise_for_status()
        block.echoes.append(time.perf_counter() - start)
        called = time.time()
        job_id = client.barrier()["job_id"]
        answered = time.time()
        view = client.job_view(job_id)
        block.calls.append(
            _Call(called, view["created_at"], view["started_at"], view["finished_at"], answered)
        )
        block.alone.append(_ledger_alone(ledger))
    return block


def _ledger_alone(ledger: Ledger) -> tuple[float, float, float]:
    """Seconds of one submit, claim and finish in a queue that nobody consumes."""
    job = JobRecord(
        id=names.new_job_id(), operation="barrier", identifier="nobody", queue="train:nobody"
    )
    moments = [time.perf_counter()]
    ledger.submit(job)
    moments.append(time.perf_counter())
    claimed = ledger.claim(job.queue)
    moments.append(time.perf_counter())
    assert claimed is not None
    ledger.finish(claimed)
    moments.append(time.perf_counter())
    drop_queue(ledger.client, job.queue)
    submit, claim, finish = (later - earlier for earlier, later in pairwise(moments))
    return submit, claim, finish


def _where(blocks: dict[str, list[_Block]]) -> Table:
    columns = [_spans(blocks[sync]) for sync in SYNCS]
    rows = [(name, *(number(column[name] * 1000) for column in columns)) for name in columns[0]]
    return Table(
        "Where the time goes: milliseconds, p50", ("span", *(f"AOF {sync}" for sync in SYNCS)), rows
    )


def _spans(blocks: list[_Block]) -> dict[str, float]:
    """Medians over all calls; the ledger's own, measured alone, are taken out of the spans that
    contain them."""
    calls = [call for block in blocks for call in block.calls]
    submit, claim, finish = (
        statistics.median(one) for one in zip(*(a for b in blocks for a in b.alone), strict=True)
    )

    def median(first: str, last: str) -> float:
        return float(
            statistics.median(getattr(call, last) - getattr(call, first) for call in calls)
        )

    return {
        "HTTP in: client, gateway's checks": median("called", "created"),
        "ledger: submit": submit,
        "RQ wakes rank 0": max(0.0, median("created", "started") - submit),
        "ledger: claim": claim,
        "ranks: broadcast, barrier": max(0.0, median("started", "finished") - claim),
        "ledger: finish": finish,
        "HTTP out: wake-up, result, client": max(0.0, median("finished", "answered") - finish),
        "barrier, whole": median("called", "answered"),
        "HTTP echo": statistics.median(echo for block in blocks for echo in block.echoes),
    }


def _redis_url(stack: Stack) -> str:
    """Where the stack's own Redis answers: its gateway knows."""
    for process in psutil.Process(stack.process.pid).children(recursive=True):
        if "nexrl_gateway" in process.cmdline():
            return process.environ()["NEXRL_REDIS_URL"]
    raise RuntimeError("the stack has no gateway")
