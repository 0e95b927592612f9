"""Memory: the gateway's while batches pass, its health meanwhile, and what ranks take and read of a
batch."""

from __future__ import annotations

import http.client
import json
import shutil
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from nexrl_contract.names import FRAME_TYPE
from nexrl_ledger import connect

from benchmarks import machine
from benchmarks.batches import Size, blank_frame, make_batch
from benchmarks.machine import MIB
from benchmarks.processes import Children, module
from benchmarks.results import Findings, Measure, Table, number
from benchmarks.service_path import IDENTIFIER, ServicePath, Store

SMALL, MEDIUM, LARGE = Size(8, 512), Size(256, 4096), Size(512, 8192)
HUGE = Size(6554, 8192)
RANKS = 2
METHOD = (
    "Growth of a process is its peak resident memory (VmHWM, reset before) above what it had, "
    "after one small batch. "
    "/health is asked every 20 ms by a process of its own. The 2 GiB frame is made while it is "
    "sent; others come from "
    "nexrl_client. Ranks: two real consumers read what an update reads (all checks, masks, "
    "micro-batches of 2 rows) "
    "without the mathematics; what they need is their rows of the six tensors. Read: of a file, "
    "the pages that "
    "ranks touch, by the processor's accessed bits; of Redis, all bytes that its server sent."
)
_DISK_MARGIN = 2 * 1024**3


class _Passing(NamedTuple):
    """One upload as the gateway felt it."""

    label: str
    grown: int
    limit_mib: float
    answers_ms: list[float]


def run(folder: Path, repetitions: int, *, quick: bool) -> Findings:
    """Repetitions do not change a peak: each thing is measured once."""
    del repetitions
    found = Findings("Memory", METHOD)
    with Children(folder) as children:
        _gateway(
            found, ServicePath(children, "uploads", "file", 1, "digest"), children, quick=quick
        )
    stores: tuple[Store, ...] = ("file", "redis")
    for store in stores:
        with Children(folder) as children:
            _ranks(found, ServicePath(children, f"ranks-{store}", store, RANKS, "update"), store)
    return found


def _gateway(found: Findings, path: ServicePath, children: Children, *, quick: bool) -> None:
    client = path.client()
    client.update_actor(make_batch(SMALL))
    batches = {size: make_batch(size) for size in (MEDIUM, LARGE)}
    passings = [
        _watch(size.label, 16, path, children, lambda size=size: client.update_actor(batches[size]))  # type: ignore[misc]
        for size in batches
    ]
    if not quick:
        _require_disk(path.data, HUGE.nbytes)
        passings.append(_watch(HUGE.label, 16, path, children, lambda: _send_blank(path, HUGE)))

    def four() -> None:
        with ThreadPoolExecutor(4) as pool:
            for job in [pool.submit(path.client().update_actor, batches[LARGE]) for _ in range(4)]:
                job.result()

    passings.append(_watch(f"four of {LARGE.label} at once", 64, path, children, four))
    for passing in passings:
        name = f"gateway grows, {passing.label}"
        found.measures.append(
            Measure(name, passing.grown / MIB, passing.limit_mib, at_least=False, unit="MiB")
        )
    slowest = max(max(passing.answers_ms) for passing in passings)
    found.measures.append(
        Measure("slowest /health meanwhile", slowest, 100, at_least=False, unit="ms")
    )
    rows = [
        (
            p.label,
            str(len(p.answers_ms)),
            number(statistics.median(p.answers_ms)),
            number(max(p.answers_ms)),
        )
        for p in passings
    ]
    found.tables.append(
        Table(
            "/health while batches pass: milliseconds",
            ("batch", "asked", "median", "slowest"),
            rows,
        )
    )


def _watch(
    label: str, limit_mib: float, path: ServicePath, children: Children, act: Callable[[], Any]
) -> _Passing:
    pulse = children.start("pulse", module("benchmarks.pulse", path.url), talks=True)
    pulse.listen()
    before = machine.reset_peak(path.gateway.pid)
    act()
    grown = machine.peak(path.gateway.pid) - before
    answers: list[float] = json.loads(pulse.ask("enough"))
    return _Passing(label, grown, limit_mib, answers)


def _send_blank(path: ServicePath, size: Size) -> None:
    nbytes, pieces = blank_frame(size)
    connection = http.client.HTTPConnection(urlsplit(path.url).netloc, timeout=120)
    headers = {"Content-Type": FRAME_TYPE, "Content-Length": str(nbytes)}
    connection.request("POST", f"/update_actor?identifier={IDENTIFIER}", pieces, headers)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    if answer.status != 200:
        raise RuntimeError(f"the {size.label} upload was answered {answer.status}: {text[:500]!r}")


def _require_disk(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < nbytes + _DISK_MARGIN:
        raise RuntimeError(
            f"{folder} has {free / 1e9:.1f} GB free and the 2 GiB upload needs more: set TMPDIR"
        )


def _ranks(found: Findings, path: ServicePath, store: str) -> None:
    client = path.client()
    client.update_actor(make_batch(SMALL))
    batch = make_batch(LARGE)
    before = _sent(path)
    metrics = client.update_actor(batch)["metrics"]
    need = LARGE.nbytes / RANKS
    ranks: list[tuple[int, int]] = metrics["ranks"]
    share = max(grown for grown, _ in ranks) / need
    read = (
        _sent(path) - before if store == "redis" else sum(touched for _, touched in ranks)
    ) / LARGE.nbytes
    label = f"{store}://, {LARGE.label}, {RANKS} ranks"
    found.measures.append(
        Measure(f"a rank's growth over its rows; {label}", share, 1.15, at_least=False)
    )
    found.measures.append(
        Measure(f"read by all ranks over the batch; {label}", read, 1.02, at_least=False)
    )


def _sent(path: ServicePath) -> int:
    """Bytes that the payloads' server has sent since it started."""
    if path.payload_redis is None:
        return 0
    client = connect(path.payload_redis)
    sent = int(client.info("stats")["total_net_output_bytes"])
    client.close()
    return sent
