"""A real gateway in a process of its own, and a test that plays the worker group through the
ledger."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import requests
import xxhash
from nexrl_contract import envelope, names
from nexrl_contract.config import parse_config
from nexrl_contract.records import GroupRecord, JobRecord, PayloadRef
from nexrl_host.processes import die_with_parent
from nexrl_ledger import Ledger
from nexrl_payloads import open_store
from tensor_codec import encode, to_json

from tests.helpers.servers import free_port, wait_until

B, S, R = 4, 8, 3
PAYLOAD = "0123456789abcdef0123456789abcdef"
"""An id for an upload in parts."""
Arrays = dict[str, Any]


class Gateway:
    """``python -m nexrl_gateway`` on a free port; its log is a file."""

    def __init__(self, folder: Path, redis_url: str, **settings: str) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self.data = folder / "data"
        self.payloads = self.data / ".nexrl" / "payloads"
        self.log = folder / "gateway.log"
        folder.mkdir(parents=True, exist_ok=True)
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("NEXRL_")
        }
        environment |= {
            "NEXRL_REDIS_URL": redis_url,
            "NEXRL_DATA": str(self.data),
            "NEXRL_PORT": self.url.rpartition(":")[2],
            **settings,
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nexrl_gateway"],
                env=environment,
                stderr=log,
                preexec_fn=die_with_parent,
            )
        try:
            wait_until(self._answers, 60, "the gateway")
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def _answers(self) -> bool:
        with contextlib.suppress(requests.ConnectionError):
            return bool(requests.get(f"{self.url}/metrics", timeout=5).status_code)
        return False

    def stop(self) -> int:
        """End it as an operator does; the exit status."""
        self.process.terminate()
        return self.process.wait(20)

    def call(self, method: str, path: str, **options: Any) -> requests.Response:
        """One request on a connection of its own."""
        return requests.request(method, f"{self.url}{path}", timeout=30, **options)

    def post(self, path: str, **options: Any) -> requests.Response:
        return self.call("POST", path, **options)

    def get(self, path: str, **options: Any) -> requests.Response:
        return self.call("GET", path, **options)

    def stored(self) -> list[str]:
        """Names of everything in the payload folder, besides the checksums of what is there."""
        found = {path.name for path in self.payloads.iterdir()}
        return sorted(found - {f".sums-{name}" for name in found})


class PlayedGroup:
    """A worker group without ranks: claims jobs from the ledger and ends them as it is told."""

    def __init__(
        self,
        ledger: Ledger,
        payloads: Path,
        identifier: str = "student",
        *,
        actor: dict[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        self.ledger, self.identifier = ledger, identifier
        self.queue = names.train_queue(identifier)
        self.store = open_store(f"file://{payloads}")
        config = parse_config(
            {"actor": {"model": {"path": "/models/tiny"}, **(actor or {})}}
        ).settings()
        record = GroupRecord(
            **{
                "identifier": identifier,
                "state": "ready",
                "initialised": True,
                "config": config,
                "epoch": 1,
                "heartbeat": time.time(),
                "created_at": time.time(),
                **fields,
            }
        )
        ledger.client.hset(names.group_key(identifier), mapping=record.to_hash())
        ledger.client.sadd(names.GROUPS_KEY, identifier)

    def claim(self) -> JobRecord | None:
        """The next job, running."""
        return self.ledger.claim(self.queue, identifier=self.identifier, epoch=1)

    def run_next(self, **ending: Any) -> JobRecord:
        """End the next job as :meth:`end` does."""
        job = wait_until(self.claim, 5, "a job")
        self.end(job, **ending)
        return job

    def end(
        self,
        job: JobRecord,
        result: dict[str, Any] | None = None,
        tensors: Arrays | None = None,
        error: dict[str, Any] | None = None,
        seq: int | None = None,
    ) -> None:
        """Finish a claimed job with a result, with tensors in a frame, or with an error."""
        if tensors is not None:
            ref = self.store.put(
                f"{job.id}.result", encode(tensors, envelope.written(result or {}))
            )
            payload = PayloadRef(id=ref.id, nbytes=ref.nbytes, checksum=ref.checksum)
            self.ledger.finish(job, result_payload=payload, error=error, seq=seq, epoch=1)
        else:
            self.ledger.finish(job, result=result, error=error, epoch=1)
        if job.payload is not None:
            self.store.delete(job.payload.id)

    @contextlib.contextmanager
    def working(self, ending: Callable[[JobRecord], dict[str, Any]]) -> Iterator[None]:
        """End every job in the background with ``ending(job)``'s arguments for :meth:`end`."""
        done = threading.Event()

        def work() -> None:
            while not done.is_set():
                job = self.claim()
                if job is None:
                    time.sleep(0.005)
                else:
                    self.end(job, **ending(job))

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def waiting(self) -> int:
        """Jobs that have not ended."""
        return self.ledger.queue_length(self.queue)


def tensors(**changes: Any) -> Arrays:
    """A whole policy batch of B rows; a change to None leaves a tensor out."""
    whole: Arrays = {
        "input_ids": np.arange(B * S, dtype=np.int64).reshape(B, S),
        "attention_mask": np.ones((B, S), dtype=np.int64),
        "responses": np.ones((B, R), dtype=np.int64),
        "advantages": np.full((B, R), 0.5, dtype=np.float32),
        "old_log_probs": np.full((B, R), -1.0, dtype=np.float32),
    }
    return {name: value for name, value in {**whole, **changes}.items() if value is not None}


def frame(arrays: Arrays | None = None, **said: Any) -> bytes:
    """The bytes of a request's frame."""
    document = {"version": 1, "metadata": {}, "params": {}, **said}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return encode(
        tensors() if arrays is None else arrays, {envelope.FRAME_METADATA_KEY: text}
    ).tobytes()


def json_tensors(arrays: Arrays | None = None) -> dict[str, Any]:
    """The same tensors as a JSON body has them."""
    return {
        name: to_json(value) for name, value in (tensors() if arrays is None else arrays).items()
    }


FRAME = {"Content-Type": names.FRAME_TYPE}
ASYNC = {"Prefer": "respond-async"}


def put_parts(gateway: Gateway, body: bytes, size: int, payload: str = PAYLOAD) -> int:
    """Upload ``body`` in parts, the last one first; how many there are."""
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    for number, part in reversed(list(enumerate(parts))):
        checksum = {names.CHECKSUM_HEADER: xxhash.xxh3_128_hexdigest(part)}
        response = gateway.call(
            "PUT", f"/payloads/{payload}/parts/{number}", data=part, headers=checksum
        )
        assert response.json() == {"payload": payload, "part": number, "nbytes": len(part)}
    return len(parts)


def refusal(response: requests.Response, status: int, code: str) -> dict[str, Any]:
    """The error of a refused request, after checking its status, code and shape."""
    assert (response.status_code, response.json().get("error", {}).get("code")) == (status, code), (
        response.text
    )
    error: dict[str, Any] = response.json()["error"]
    assert set(error) >= {"code", "message", "retryable", "identifier", "job_id", "rank"}
    assert ("Retry-After" in response.headers) == (status in (429, 503))
    return error


def keys_of(value: Any) -> Any:
    """What a document looks like without its values; of a list only the first item, which the
    others are like."""
    if isinstance(value, dict):
        return {name: keys_of(inner) for name, inner in value.items()}
    return [keys_of(inner) for inner in value[:1]] if isinstance(value, list) else None


def memory_peak(pid: int) -> int:
    """Bytes of the highest resident memory since :func:`forget_peak`."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def slowest_health(gateway: Gateway, work: Callable[[], object]) -> float:
    """Seconds of the slowest /health while ``work`` runs."""
    done = threading.Event()
    times: list[float] = []

    def look() -> None:
        with requests.Session() as session:
            while not done.is_set():
                started = time.monotonic()
                assert session.get(f"{gateway.url}/health", timeout=10).status_code == 200
                times.append(time.monotonic() - started)
                time.sleep(0.02)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return sorted(times)[int(len(times) * 0.95)]
