"""Bodies that are taken straight from the connection, on both event loops, with clients that are
raw sockets."""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import requests
import uvicorn
import xxhash
from anyio.to_thread import run_sync
from nexrl_contract.names import CHECKSUM_HEADER
from nexrl_gateway.direct import DirectProtocol, direct_body
from starlette.requests import ClientDisconnect, Request

from tests.helpers.gateway import FRAME, Gateway, PlayedGroup, frame
from tests.helpers.servers import free_port, wait_until

BIG = bytes(range(251)) * 16_000  # 4 MB, at an odd length


@dataclass
class Receiver:
    """An application that takes what it can directly, and a server for it. ``/fail`` cannot write a
    second piece."""

    loop: str
    gone: int = 0
    port: int = field(default_factory=free_port)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        try:
            status, document = await self._answer(request)
        except ClientDisconnect:
            self.gone += 1
            status, document = 400, {}
        body = json.dumps(document).encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, request: Request) -> tuple[int, dict[str, Any]]:
        if request.method == "GET":
            return 200, {"thread": await run_sync(threading.get_ident)}
        seen = hashlib.sha256()
        pieces = request.stream()
        head = await anext(pieces) if request.url.path != "/at-once" else b""
        direct = direct_body(request)
        if direct is None:
            seen.update(head)
            async for piece in pieces:
                seen.update(piece)
        else:
            try:
                await direct.copy(head, self._full if request.url.path == "/fail" else seen.update)
            except OSError as error:
                return 507, {"error": str(error)}
        return 200, {"sha256": seen.hexdigest(), "direct": direct is not None}

    def _full(self, _: memoryview) -> None:
        raise OSError("no space")

    def serve(self) -> Iterator[Receiver]:
        """Until the test ends."""
        config = uvicorn.Config(
            self,
            port=self.port,
            loop=self.loop,
            http=DirectProtocol,
            lifespan="off",
            log_config=None,
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        wait_until(lambda: server.started, 10, "the server")
        yield self
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()

    def connect(self) -> socket.socket:
        """A client's end."""
        client = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return client


@pytest.fixture(params=["uvloop", "asyncio"])
def receiver(request: pytest.FixtureRequest) -> Iterator[Receiver]:
    yield from Receiver(request.param).serve()


def post(body: bytes, path: str = "/", *headers: str) -> bytes:
    """The head of a request for ``body``."""
    return "\r\n".join(
        [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers, "", ""]
    ).encode()


def read_answer(client: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and document of the next answer, and not a byte more."""
    answer = http.client.HTTPResponse(_Unbuffered(client))  # type: ignore[arg-type]
    answer.begin()
    return answer.status, json.loads(answer.read())


class _Unbuffered:
    """What http.client needs of a socket: a file that reads only what is asked for."""

    def __init__(self, client: socket.socket) -> None:
        self._client = client

    def makefile(self, _: str) -> Any:
        return self._client.makefile("rb", buffering=0)


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def test_a_large_body_is_taken_directly(receiver: Receiver) -> None:
    """Every byte, in order, and the connection serves the next request."""
    with receiver.connect() as client:
        for body in (BIG, BIG[::-1], BIG[:1_000_001]):
            client.sendall(post(body) + body)
            assert read_answer(client) == (200, {"sha256": digest(body), "direct": True})


def test_requests_behind_a_body_are_requests(receiver: Receiver) -> None:
    """Of a pipeline in one stream of bytes each request is answered, in order; nothing of the next
    is in a body."""
    small = b"small"
    stream = (
        post(BIG)
        + BIG
        + b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
        + post(small)
        + small
        + post(BIG)
        + BIG
    )
    with receiver.connect() as client:
        sender = threading.Thread(target=client.sendall, args=(stream,))
        sender.start()
        answers = [read_answer(client) for _ in range(4)]
        sender.join()
    assert [status for status, _ in answers] == [200] * 4
    assert answers[0][1] == {"sha256": digest(BIG), "direct": True}
    assert "thread" in answers[1][1]
    assert answers[2][1] == {"sha256": digest(small), "direct": False}
    assert answers[3][1]["sha256"] == digest(BIG)


@pytest.mark.parametrize(
    "cuts", [[1, 70_000], [10, 300_000, 300_001, 2_000_000], [4_015_999]], ids=str
)
def test_a_body_in_pieces(cuts: list[int], receiver: Receiver) -> None:
    """A client that stops for a while, anywhere, is waited for."""
    with receiver.connect() as client:
        client.sendall(post(BIG))
        for start, end in zip([0, *cuts], [*cuts, len(BIG)], strict=True):
            client.sendall(BIG[start:end])
            time.sleep(0.05)
        assert read_answer(client)[1]["sha256"] == digest(BIG)


def test_a_chunked_body_comes_by_messages(receiver: Receiver) -> None:
    """Its end cannot be known, so it is left to the parser; a body of known length may follow on
    the connection."""
    head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"".join(
        b"%x\r\n%b\r\n" % (len(part), part) for part in (BIG[:1_000_000], BIG[1_000_000:])
    )
    with receiver.connect() as client:
        client.sendall(head + chunks + b"0\r\n\r\n")
        assert read_answer(client) == (200, {"sha256": digest(BIG), "direct": False})
        client.sendall(post(BIG) + BIG)
        assert read_answer(client)[1]["direct"]


@pytest.mark.parametrize("path", ["/", "/at-once"])
def test_a_client_that_expects_100(path: str, receiver: Receiver) -> None:
    """It is told to continue, once, whether or not the application has asked for the first bytes
    before."""
    with receiver.connect() as client:
        client.sendall(post(BIG, path, "Expect: 100-continue"))
        assert client.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(BIG)
        assert read_answer(client)[1]["sha256"] == digest(BIG)


def test_a_body_that_nobody_can_store(receiver: Receiver) -> None:
    """The answer says so, the rest of the body is dropped, and the same connection serves the next
    request."""
    with receiver.connect() as client:
        stream = post(BIG, "/fail") + BIG + post(BIG) + BIG
        sender = threading.Thread(target=client.sendall, args=(stream,))
        sender.start()
        assert read_answer(client) == (507, {"error": "no space"})
        assert read_answer(client) == (200, {"sha256": digest(BIG), "direct": True})
        sender.join()


def test_a_server_without_descriptors(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request fails, and nothing has been changed: its connection goes on with the next one."""

    def full(_: int) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    with receiver.connect() as client:
        with monkeypatch.context() as patch:
            patch.setattr("nexrl_gateway.direct.os.dup", full)
            sender = threading.Thread(target=client.sendall, args=(post(BIG) + BIG,))
            sender.start()
            assert read_answer(client)[0] == 507
            sender.join()
        client.sendall(post(BIG) + BIG)
        assert read_answer(client) == (200, {"sha256": digest(BIG), "direct": True})


def _close(client: socket.socket) -> None:
    client.close()


def _reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def _half_close(client: socket.socket) -> None:
    client.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("leave", [_close, _reset, _half_close])
def test_a_client_that_leaves(leave: Callable[[socket.socket], None], receiver: Receiver) -> None:
    """The application hears of it, and the server goes on."""
    with receiver.connect() as client:
        client.sendall(post(BIG) + BIG[:-1])
        time.sleep(0.05)
        leave(client)
        wait_until(lambda: receiver.gone == 1, 5, "the disconnect")
    with receiver.connect() as client:
        client.sendall(post(BIG) + BIG)
        assert read_answer(client)[0] == 200


def test_silent_clients_hold_no_threads(receiver: Receiver) -> None:
    """More stalled uploads than there are threads take no processor time, and who needs a thread is
    served at once."""
    stalled = [receiver.connect() for _ in range(60)]
    for client in stalled:
        client.sendall(post(BIG) + BIG[:300_000])

    def idle() -> bool:
        used = time.process_time()
        time.sleep(0.5)
        return time.process_time() - used < 0.1

    wait_until(idle, 10, "an end of the work on what has arrived")
    with receiver.connect() as client:
        start = time.monotonic()
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_answer(client)[0] == 200
        assert time.monotonic() - start < 4  # no thread is free before the clients leave
    for client in stalled:
        client.close()
    wait_until(lambda: receiver.gone == 60, 10, "the disconnects")


def test_a_stop_does_not_wait_for_a_stalled_body() -> None:
    """The fixture's end fails if the server does not."""
    serving = Receiver("uvloop").serve()
    client = next(serving).connect()
    client.sendall(post(BIG) + BIG[:300_000])
    time.sleep(0.1)
    with pytest.raises(StopIteration):
        next(serving)
    client.close()


def test_the_gateway_takes_frames_and_parts_directly(gateway: Gateway, group: PlayedGroup) -> None:
    """What is stored is what was sent, over one connection; a refused frame in between costs
    nothing but itself."""
    rows = {"input_ids": np.arange(400_000, dtype=np.int64).reshape(2, 200_000)}
    good = frame(rows | {"attention_mask": np.ones((2, 200_000), np.int64)})
    bad = frame({"attention_mask": rows["input_ids"]})
    query = "?identifier=student"
    with requests.Session() as session:
        part = session.put(
            f"{gateway.url}/payloads/{'a' * 32}/parts/0",
            data=BIG,
            headers={CHECKSUM_HEADER: xxhash.xxh3_128_hexdigest(BIG)},
            timeout=10,
        )
        assert part.status_code in (200, 201), part.text
        refused = session.post(
            f"{gateway.url}/compute_log_prob{query}", data=bad, headers=FRAME, timeout=10
        )
        assert refused.status_code == 422, refused.text
        headers = FRAME | {"Prefer": "respond-async"}
        taken = session.post(
            f"{gateway.url}/compute_log_prob{query}", data=good, headers=headers, timeout=10
        )
        assert taken.status_code == 202, taken.text
    job = group.claim()
    assert job is not None and job.payload is not None
    assert b"".join(group.store.stream(job.payload.id)) == good
    group.end(job, {})
