"""Bodies, headers and connections made to stall the gateway or to fill its memory: it answers, and
others do not notice."""

from __future__ import annotations

import base64
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import uvicorn
from nexrl_gateway.app import create_app
from nexrl_gateway.direct import DirectProtocol
from nexrl_gateway.settings import Settings
from tensor_codec import to_json

from tests.helpers.gateway import (
    ASYNC,
    FRAME,
    Gateway,
    PlayedGroup,
    forget_peak,
    frame,
    json_tensors,
    memory_peak,
    refusal,
    slowest_health,
)
from tests.helpers.servers import free_port, wait_until

MIB = 1024**2
JSON = {"Content-Type": "application/json", **ASYNC}
UPDATE = "/update_actor?identifier=student"
HEADER = b'{"a":[' + b"[]," * 340_000 + b"[]]}"
ATTACKS: dict[str, tuple[bytes, dict[str, str]]] = {
    "lists": (b'{"a":[' + b"[]," * 366_000 + b"[]]}", JSON),
    "30 MB of lists": (b'{"a":[' + b"[]," * 10_000_000 + b"[]]}", JSON),
    "30 MB of one text": (b'{"values":{"a":"' + b"x" * 30_000_000 + b'"}}', JSON),
    "30 MB of white space": (b'{"a":1' + b" " * 30_000_000 + b"}", JSON),
    "nesting": (b'{"a":' + b"[" * 1_100_000, JSON),
    "objects, as many as are read": (
        b'{"a":[' + b",".join(b'{"k%d":{}}' % i for i in range(24_000)) + b"]}",
        JSON,
    ),
    "unknown arguments": (b"{" + b",".join(b'"k%d":0' % i for i in range(49_000)) + b"}", JSON),
    "a frame's header of lists": (len(HEADER).to_bytes(8, "little") + HEADER, {**FRAME, **ASYNC}),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_bodies_are_refused_and_nobody_waits(
    name: str, gateway: Gateway, group: PlayedGroup
) -> None:
    """Eight at a time cost less than 160 MiB, all of them are answered, and /health goes on
    answering."""
    body, headers = ATTACKS[name]
    forget_peak(gateway.process.pid)
    before = memory_peak(gateway.process.pid)

    def attack() -> None:
        with ThreadPoolExecutor(8) as pool:
            for answer in pool.map(
                lambda _: gateway.post(UPDATE, data=body, headers=headers), range(16)
            ):
                assert answer.status_code in (400, 413, 422, 503), answer.text
                assert len(answer.content) < 1000

    assert slowest_health(gateway, attack) < 1.0  # 0.1 on a machine that does nothing else
    assert memory_peak(gateway.process.pid) - before < 160 * MIB
    assert group.waiting() == 0


def test_tensors_up_to_the_limit_are_read_bit_by_bit(gateway: Gateway, group: PlayedGroup) -> None:
    """31 MiB of base64, beside texts full of commas and brackets, which are no structure. Meanwhile
    /health answers."""
    rows = np.frombuffer(os.urandom(11 * MIB), np.int64).reshape(4, -1) >> 1
    arrays = {"input_ids": rows, "attention_mask": rows & 1}
    document = {
        "tensors": json_tensors(arrays),
        "values": {"prompts": ['[{,"\\,' * 20_000] * 4},
        "metadata": {"a": [[1]]},
    }
    body = json.dumps(document)
    assert 29 * MIB < len(body) < 32 * MIB
    answers: list[requests.Response] = []

    def send(_: int) -> None:
        answers.append(
            gateway.post("/compute_log_prob?identifier=student", data=body, headers=JSON)
        )

    with ThreadPoolExecutor(3) as pool:
        assert (
            slowest_health(gateway, lambda: list(pool.map(send, range(6)))) < 0.5
        )  # 0.05 where nothing else runs
    assert {answer.status_code for answer in answers} == {202}, answers[0].text
    job = group.claim()
    assert job is not None and job.payload is not None
    with group.store.open(job.payload.id) as payload:
        for name, array in arrays.items():
            assert (payload.torch(name).numpy() == array).all()
    group.end(job, {})


@pytest.mark.parametrize("where", [0, 1])
def test_long_base64_that_is_wrong_in_one_piece(
    where: int, gateway: Gateway, group: PlayedGroup
) -> None:
    """Padding in the middle, or a sign that is none: refused however far from the end it stands."""
    tensor = to_json(np.zeros((4, 100_000), np.int64))
    at = (1024**2, 2 * 1024**2 + 5)[where]
    tensor["data"] = tensor["data"][: at - 2] + ("==", "?A")[where] + tensor["data"][at:]
    error = refusal(gateway.post(UPDATE, json={"tensors": {"input_ids": tensor}}), 400, "MALFORMED")
    assert error["tensor"] == "input_ids"
    assert "base64" in error["message"]
    assert len(base64.b64decode(tensor["data"][:4])) == 3


class Quick:
    """The real application and protocol in this process, with little patience and room for twelve
    connections."""

    def __init__(self, folder: Path, redis_url: str) -> None:
        self.port = free_port()
        self.payloads = folder / "payloads"
        settings = Settings(data=folder, payloads=f"file://{self.payloads}", redis_url=redis_url)
        config = uvicorn.Config(
            create_app(settings),
            port=self.port,
            http=DirectProtocol,
            log_config=None,
            limit_concurrency=12,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        wait_until(lambda: self._server.started, 20, "the server")

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    def connect(self, sent: bytes = b"") -> socket.socket:
        """A client that has sent so much."""
        client = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        client.sendall(sent)
        return client


def answer(client: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and document of what comes until the server closes; (0, {}) for nothing."""
    received = bytearray()
    try:
        while piece := client.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    if not received:
        return 0, {}
    head, _, body = bytes(received).partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@pytest.fixture
def quick(tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Quick]:
    monkeypatch.setattr("nexrl_gateway.direct.HEAD_S", 1.0)
    monkeypatch.setattr("nexrl_gateway.direct.STALL_S", 1.0)
    quick = Quick(tmp_path, redis_url)
    yield quick
    quick.stop()


def head(line: str, *headers: str) -> bytes:
    return "\r\n".join([f"{line} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()


def test_what_stops_coming_is_given_up(quick: Quick, group: PlayedGroup) -> None:
    """A silent connection is closed, half a head and half a body get 408, and of the body nothing
    stays in the store."""
    body = frame({"input_ids": np.zeros((4, 40_000), np.int64)})
    post = "POST /compute_log_prob?identifier=student"
    frames, chunked = f"Content-Type: {FRAME['Content-Type']}", "Transfer-Encoding: chunked"
    piece = b"%x\r\n%b\r\n" % (300_000, body[:300_000])
    clients = {
        "nothing": quick.connect(),
        "half a head": quick.connect(b"GET /health HTTP/1.1\r\nHost: lo"),
        "empty lines": quick.connect(b"\r\n\r\n"),
        "half a body": quick.connect(
            head(post, frames, f"Content-Length: {len(body)}") + body[:300_000]
        ),
        "half a chunked body": quick.connect(head(post, frames, chunked) + piece),
        "half a JSON body": quick.connect(
            head(post, "Content-Type: application/json", "Content-Length: 90") + b"{"
        ),
        "half a part": quick.connect(
            head(
                f"PUT /payloads/{'a' * 32}/parts/0",
                f"X-Checksum-XXH3-128: {'0' * 32}",
                "Content-Length: 900",
            )
            + b"x"
        ),
    }
    wait_until(lambda: list(quick.payloads.rglob("*")), 5, "the uploads")
    for name, client in clients.items():
        with client:
            status, document = answer(client)
        expected = (0, None) if name == "nothing" else (408, "SLOW_REQUEST")
        assert (status, document.get("error", {}).get("code")) == expected, name
    left = [
        path for path in quick.payloads.rglob("*") if path.is_file() and path.stat().st_size > 100
    ]
    assert left == []
    assert group.waiting() == 0


def test_who_waits_for_an_answer_is_left_alone(quick: Quick, group: PlayedGroup) -> None:
    """Longer than a head or a body may take; and the connection serves the next request."""
    with requests.Session() as session:
        url = f"http://127.0.0.1:{quick.port}"
        job = session.post(f"{url}/barrier?identifier=student", headers=ASYNC, timeout=10).json()[
            "id"
        ]
        assert session.get(f"{url}/jobs/{job}?wait=2.5", timeout=10).json()["state"] == "queued"
        time.sleep(1.5)
        assert session.get(f"{url}/health", timeout=10).status_code == 200


@pytest.mark.parametrize(
    "endless", ["X: ", "X: y\r\n" * 20_000, "/" * 70_000], ids=["one", "many", "another"]
)
def test_an_endless_head_is_cut_off(endless: str, quick: Quick, redis_url: str) -> None:
    """431 in the one shape of errors, long before it has taken memory."""
    sent = 0
    with quick.connect(f"GET /health HTTP/1.1\r\nHost: localhost\r\n{endless}".encode()) as client:
        try:
            while sent < 20 * MIB:
                client.sendall(b"a" * 65536)
                sent += 65536
                time.sleep(0.001)
        except OSError:
            pass
        assert sent < 10 * MIB
    with quick.connect(head("GET /health", f"X: {'a' * 70_000}")) as client:
        status, document = answer(client)
    assert (status, document["error"]["code"]) == (431, "HEADERS_TOO_LARGE")


def test_an_endless_trailer_is_cut_off(quick: Quick, group: PlayedGroup) -> None:
    """What follows a chunked body is bounded as what goes before it."""
    begun = head(
        "POST /barrier?identifier=student",
        "Content-Type: application/json",
        "Transfer-Encoding: chunked",
    )
    for trailer in (b"X: " + b"a" * 65536, b"X: a\r\n" * 10_000):
        sent = 0
        with quick.connect(begun + b"1\r\n{\r\n0\r\n") as client:
            try:
                while sent < 20 * MIB:
                    client.sendall(trailer)
                    sent += len(trailer)
                    time.sleep(0.001)
            except OSError:
                pass
        assert sent < 10 * MIB


def test_an_error_does_not_repeat_what_is_long(gateway: Gateway, redis_url: str) -> None:
    """However long a path or a name was, its answer is short."""
    for method, path in (
        ("GET", f"/jobs/{'a' * 60_000}"),
        ("GET", f"/{'a' * 60_000}"),
        ("POST", f"/jobs/{'a' * 60_000}"),
    ):
        refused = gateway.call(method, path)
        assert refused.status_code in (404, 405)
        assert len(refused.content) < 1000


def test_what_is_no_http_gets_the_one_shape_of_errors(quick: Quick) -> None:
    with quick.connect(b"\x16\x03\x01 hello\r\n\r\n") as client:
        status, document = answer(client)
    assert (status, document["error"]["code"]) == (400, "MALFORMED")


def test_idle_connections_make_room_for_whoever_comes(quick: Quick, group: PlayedGroup) -> None:
    """Those that never asked go first; where all are at work it is 503 at once, and /health answers
    all the same."""
    kept = requests.Session()
    url = f"http://127.0.0.1:{quick.port}"
    assert kept.get(f"{url}/health", timeout=10).status_code == 200
    opened = [quick.connect(b"GET /health HTTP/1.1\r\nHost: lo") for _ in range(40)]
    assert requests.get(f"{url}/health", timeout=10).status_code == 200
    assert answer(opened[0]) == (0, {})
    waiting = [quick.connect(head("POST /barrier?identifier=student")) for _ in range(12)]
    wait_until(lambda: group.waiting() == 12, 10, "the barriers")
    refusal(requests.post(f"{url}/barrier?identifier=student", timeout=10), 503, "GATEWAY_BUSY")
    assert requests.get(f"{url}/health", timeout=10).status_code == 200
    for client in [*opened, *waiting]:
        client.close()
    kept.close()


def test_a_client_that_takes_nothing_of_its_answer_is_given_up(
    quick: Quick, group: PlayedGroup
) -> None:
    """Nobody holds a connection, and the memory of an answer, for ever."""
    job = requests.post(
        f"http://127.0.0.1:{quick.port}/barrier?identifier=student", headers=ASYNC, timeout=10
    ).json()
    claimed = group.claim()
    assert claimed is not None
    group.end(claimed, tensors={"old_log_probs": np.zeros((4, 3_000_000), np.float32)})
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(10)
    client.connect(("127.0.0.1", quick.port))
    client.sendall(head(f"GET /jobs/{job['id']}/result", "Accept: application/vnd.nexrl.frame"))
    time.sleep(3)
    taken = 0
    try:
        while piece := client.recv(MIB):
            taken += len(piece)
    except ConnectionResetError:
        pass
    assert taken < 40 * MIB
    client.close()


def test_a_hundred_clients_may_wait_at_a_time(gateway: Gateway, group: PlayedGroup) -> None:
    """Each gets its job's end when it comes."""
    job = gateway.post("/barrier?identifier=student", headers=ASYNC).json()["id"]
    with ThreadPoolExecutor(100) as pool:
        answers = [pool.submit(gateway.get, f"/jobs/{job}?wait=20") for _ in range(100)]
        time.sleep(1)
        group.run_next(result={})
        states = {each.result().json()["state"] for each in answers}
    assert states == {"finished"}
