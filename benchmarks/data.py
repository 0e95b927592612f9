"""The data path: from the client's call to tensors in the worker, against the two ways of
before."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from nexrl_payloads import Payload, open_store
from nexrl_payloads.checks import PIECE, BlockHasher
from tensor_codec import encode
from torch import Tensor

from benchmarks.baselines import HttpBaseline, ZmqBaseline
from benchmarks.batches import Size, digest, make_batch
from benchmarks.processes import Children, free_port, listens, module
from benchmarks.results import Findings, Measure, Table, ratios, spread
from benchmarks.service_path import ServicePath

SIZES = (Size(256, 4096), Size(512, 8192))
HTTP, ZMQ, FILE, REDIS = "1.2 HTTP", "1.4 ZMQ", "file://", "redis://"
TARGETS = ((FILE, HTTP, 15.0), (FILE, ZMQ, 2.5), (REDIS, HTTP, 8.0), (REDIS, ZMQ, 1.3))
METHOD = (
    "Seconds from the client's call with the tensors in memory until one worker process has read "
    "every byte of all six "
    "tensors (an xxh3 over them, compared with the client's; the same for all). What follows, the "
    "job's end and the "
    "answer, is waited for but not timed, for all alike. Each repetition runs every way once, in "
    "turning order. "
    "file:// and redis:// are nexrl_client, the gateway's process, the store, the ledger "
    "(append-only file, fsync "
    "always) and a rank's consumer and rows; redis:// keeps payloads in a second server without "
    "an append-only file. "
    "Checksums: what the file:// way spends on the checksums of blocks, which the store makes as "
    "bytes come in and a "
    "rank compares with what it reads; measured in one process by storing and reading the batch "
    "with and without."
)
_CHECKS = 7
Send = Callable[[Mapping[str, Tensor]], tuple[float, str]]


def run(folder: Path, repetitions: int, *, quick: bool) -> Findings:
    """Start everything once and measure all sizes."""
    found = Findings("Data path", METHOD)
    with Children(folder) as children:
        ways = _start(children)
        for size in SIZES[:1] if quick else SIZES:
            _measure(found, size, ways, repetitions)
    return found


def _start(children: Children) -> dict[str, Send]:
    http_port, http_worker, zmq_worker = free_port(), free_port(), free_port()
    for name, port in (("http-worker", http_worker), ("zmq-worker", zmq_worker)):
        children.start(name, module("benchmarks.baselines", "worker", str(port)))
    server = children.start(
        "http-server", module("benchmarks.baselines", "http", str(http_port), str(http_worker))
    )
    server.until(lambda: listens(http_port), "the server of 1.2")
    http, zmq = HttpBaseline(http_port), ZmqBaseline(zmq_worker)
    children.callback(http.close)
    children.callback(zmq.close)
    ways: dict[str, Send] = {HTTP: http.send, ZMQ: zmq.send}
    for name, store in ((FILE, "file"), (REDIS, "redis")):
        ways[name] = _service(ServicePath(children, store, store, 1, "digest"))  # type: ignore[arg-type]
    return ways


def _service(path: ServicePath) -> Send:
    client = path.client()

    def send(tensors: Mapping[str, Tensor]) -> tuple[float, str]:
        metrics: dict[str, Any] = client.update_actor(
            {"tensors": tensors, "metadata": {"temperature": 1.0}}
        )["metrics"]
        return float(metrics["read_at"]), str(metrics["digest"])

    return send


def _measure(found: Findings, size: Size, ways: dict[str, Send], repetitions: int) -> None:
    batch = make_batch(size)
    wanted = digest(batch)
    taken: defaultdict[str, list[float]] = defaultdict(list)
    order = list(ways)
    for repetition in range(-1, repetitions):  # the first one warms up
        for name in order:
            start = time.monotonic()
            read_at, seen = ways[name](batch)
            if seen != wanted:
                raise RuntimeError(f"{name} delivered other bytes than were sent")
            if repetition >= 0:
                taken[name].append(read_at - start)
        order = [*order[1:], order[0]]
    for ours, theirs, target in TARGETS:
        name = f"{size.label}: {ours} faster than {theirs}"
        found.measures.append(
            Measure.of(name, ratios(taken[theirs], taken[ours]), target, at_least=True)
        )
    found.measures.append(_checksums(found, size, batch, statistics.median(taken[FILE])))
    rows = [
        (name, *spread(times, 1000.0), f"{size.nbytes / 1e6 / min(times):.0f}")
        for name, times in taken.items()
    ]
    found.tables.append(
        Table(f"{size.label}: milliseconds", ("way", "median", "spread", "best MB/s"), rows)
    )


def _checksums(found: Findings, size: Size, batch: Mapping[str, Tensor], path_s: float) -> Measure:
    """The share of the path that checksums take: reading with and without them in turns, and
    hashing by itself."""
    taken: defaultdict[str, list[float]] = defaultdict(list)
    frame = encode(batch)
    with tempfile.TemporaryDirectory(prefix="nexrl-bench-") as folder:
        store = open_store(f"file://{folder}")
        ref = store.put("batch", frame)
        for _ in range(_CHECKS):
            hasher = BlockHasher("batch", None)
            start = time.monotonic()
            for buffer in frame:
                for at in range(0, len(buffer), PIECE):
                    hasher.add([memoryview(buffer)[at : at + PIECE]])
            hasher.table()
            taken["made"].append(time.monotonic() - start)
            for way, checksum in (("read without", None), ("read and compared", ref.checksum)):
                with store.open(ref.id, checksum) as payload:
                    start = time.monotonic()
                    _read(payload, batch)
                    taken[way].append(time.monotonic() - start)
    rows = [(way, *spread(times, 1000.0)) for way, times in taken.items()]
    found.tables.append(
        Table(f"{size.label}: checksums, milliseconds", ("what", "median", "spread"), rows)
    )
    made, without, compared = (
        min(times) for times in taken.values()
    )  # what neighbours did is not ours
    share = (made + compared - without) / path_s
    return Measure(f"{size.label}: checksums' share of file://", share, 0.3, at_least=False)


def _read(payload: Payload, batch: Mapping[str, Tensor]) -> None:
    for name in batch:
        payload.torch(name).view(torch.uint8).max()
