"""Connections: large bodies straight from their socket, and an end to what is endless, stalled or
too much.

uvicorn hands a body over in messages that its event loop has copied four times: an upload takes
nearly twice as long (decision 0007). So :class:`DirectProtocol` (``http=`` of ``uvicorn.Config``)
parses heads as uvicorn does, and offers the rest of a body of known length in
``scope["extensions"]``. Who takes it gets a second descriptor of the paused connection, and a
thread that reads it. Another server, TLS or a chunked body offers nothing, and the body comes by
ASGI messages.

uvicorn bounds neither a head's bytes nor the time that a head or a body takes, and above
``limit_concurrency`` it refuses whoever comes, while idle connections stay. So the protocol does: a
head has ``HEAD_BYTES`` and ``HEAD_S``, a body its :class:`Pace`, and above ``limit_concurrency``
connections the idle ones go first.

What relies on uvicorn's ``HttpToolsProtocol`` is here alone, and is listed in
``tests/gateway/test_uvicorn_contract.py``. The parser is made anew for the next request, because
httptools cannot be told to skip bytes.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import anyio
import httptools
from anyio.to_thread import run_sync
from fastapi import Request
from nexrl_contract.errors import ServiceError
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from nexrl_gateway.responses import json_response
from nexrl_gateway.strict_json import json_bytes

HEAD_BYTES = 64 * 1024
"""Of a request before its body, or of a chunked body between its pieces."""
HEAD_S = 30.0
"""From a connection's start, or a request's first byte, to the end of its head; and for the rest of
a refused body."""
STALL_S = 60.0
STALL_BYTES = 64 * 1024
"""A body that brings fewer bytes in ``STALL_S`` is given up, and so is a client that takes none of
its answer."""
ALWAYS_ANSWERED = ("/health", "/ready", "/metrics")
_EXTENSION = "nexrl.body"
_BUFFER_BYTES = 1024 * 1024
_SMALL_BUFFER_BYTES = 64 * 1024
_LARGE_BUFFERS = 32
_SLICE_S = 0.05  # a stop, and others who wait for a thread, need not wait longer
_PATIENCE_S = 0.002  # going to sleep on the event loop and back costs about as much


class Pace:
    """How long a body's next bytes may take: any ``STALL_S`` must bring ``STALL_BYTES``, or its
    end."""

    def __init__(self) -> None:
        self._saw = 0
        self._due = time.monotonic() + STALL_S

    def saw(self, nbytes: int) -> None:
        """So much has come."""
        self._saw += nbytes
        if self._saw >= STALL_BYTES:
            self._saw, self._due = 0, time.monotonic() + STALL_S

    def left_s(self) -> float:
        """Seconds until it is too slow."""
        return max(0.0, self._due - time.monotonic())

    def too_slow(self) -> ServiceError:
        """What to answer then."""
        return ServiceError(
            "SLOW_REQUEST", f"the body brought {self._saw} bytes in {STALL_S:g} s; send it again"
        )


class DirectBody:
    """The rest of one request's body: the bytes that the parser has not passed on."""

    def __init__(self, protocol: DirectProtocol, cycle: RequestResponseCycle, nbytes: int) -> None:
        self._protocol = protocol
        self._cycle = cycle
        self._unparsed = nbytes

    def parsed(self, nbytes: int) -> None:
        """The parser has passed these bytes on to the cycle."""
        self._unparsed -= nbytes

    @property
    def offered(self) -> bool:
        """Whether some of the body is still to come, so that taking it is worth while."""
        return (
            self._unparsed > 0
            and not self._cycle.disconnected
            and not self._protocol.transport.is_closing()
        )

    async def copy(self, head: bytes | bytearray, write: Callable[[memoryview], None]) -> None:
        """Give ``head`` and then all that follows to ``write``, in a thread, in views that are
        valid for the call.

        Raises ClientDisconnect, and what ``write`` raises; the connection stays usable after the
        latter.
        """
        protocol, cycle = self._protocol, self._cycle
        transport = protocol.transport
        # This may fail, so it comes before anything is changed.
        descriptor = os.dup(transport.get_extra_info("socket").fileno())
        with socket.socket(fileno=descriptor) as connection:
            connection.settimeout(_PATIENCE_S)
            # From here to go_on_after the event loop reads nothing of this connection, so what the
            # parser has passed on and what is left in the socket are all there is.
            protocol.flow.pause_reading()
            if cycle.waiting_for_100_continue:
                transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                cycle.waiting_for_100_continue = False
            here, cycle.body = cycle.body, bytearray()
            protocol.parser = protocol.make_parser()
            blocks = _Blocks(write)
            try:
                await self._copy(connection, blocks, head, here)
            except ClientDisconnect:
                cycle.disconnected = True
                transport.close()
                raise
            finally:
                blocks.close()
                unread, self._unparsed = self._unparsed, 0
                protocol.go_on_after(unread)

    async def _copy(
        self, connection: socket.socket, blocks: _Blocks, *here: bytes | bytearray
    ) -> None:
        await run_sync(blocks.add, *here)
        pace = Pace()
        while self._unparsed:
            before = self._unparsed
            await run_sync(self._take, connection, blocks)
            pace.saw(before - self._unparsed)
            if self._unparsed:
                with anyio.move_on_after(pace.left_s()) as patience:
                    await anyio.wait_readable(connection)
                if patience.cancelled_caught:
                    raise pace.too_slow()
        await run_sync(blocks.flush)

    def _take(self, connection: socket.socket, blocks: _Blocks) -> None:
        """Take what comes within a moment; in a thread, one at a time."""
        end = time.monotonic() + _SLICE_S
        while self._unparsed and time.monotonic() < end:
            try:
                count = connection.recv_into(blocks.free[: self._unparsed])
            except TimeoutError:
                return
            except OSError as error:
                raise ClientDisconnect from error
            if count == 0:
                raise ClientDisconnect
            # Counted before it is written: a write that fails leaves the rest to be dropped.
            self._unparsed -= count
            blocks.advance(count)


class _Blocks:
    """A buffer that is filled before it is written: stores take whole blocks faster than what a
    socket gives at a time."""

    _large = threading.Semaphore(_LARGE_BUFFERS)
    """What a process holds for uploads is bounded, however many stall with theirs half full."""

    def __init__(self, write: Callable[[memoryview], None]) -> None:
        self._write = write
        self._is_large = self._large.acquire(blocking=False)
        size = _BUFFER_BYTES if self._is_large else _SMALL_BUFFER_BYTES
        self._buffer = self.free = memoryview(bytearray(size))

    def close(self) -> None:
        """Give the buffer back."""
        if self._is_large:
            self._large.release()

    def add(self, *pieces: bytes | bytearray) -> None:
        """Take what was read before."""
        for piece in pieces:
            with memoryview(piece) as view:
                position = 0
                while position < view.nbytes:
                    count = min(view.nbytes - position, self.free.nbytes)
                    self.free[:count] = view[position : position + count]
                    position += count
                    self.advance(count)
            if isinstance(piece, bytearray):
                piece.clear()  # whoever gave it keeps it as long as the upload lasts

    def advance(self, count: int) -> None:
        """``count`` bytes have been put where it was free."""
        self.free = self.free[count:]
        if not self.free:
            self.flush()

    def flush(self) -> None:
        """Write what there is."""
        filled = self._buffer[: self._buffer.nbytes - self.free.nbytes]
        self.free = self._buffer
        if filled:
            self._write(filled)


class DirectProtocol(HttpToolsProtocol):
    """uvicorn's protocol, whose bodies of known length may be taken off the connection; see the
    module."""

    _body: DirectBody | None = None
    _unwanted = 0
    _unseen = 0
    """Bytes since the parser last told of something that is bounded elsewhere."""
    _head_bytes = 0
    _in_message = False
    """A request's head is complete and its body is not."""
    _timer: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None
    _refusal: ServiceError | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._most, self.limit_concurrency = self.limit_concurrency, None

    # -- connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._idle_since = time.monotonic()
        self._give(HEAD_S)
        if self._most is not None and len(self.connections) > self._most:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._give(None)
        self._watch_answer(None)
        super().connection_lost(exc)

    @property
    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _make_room(self) -> None:
        """Close the connection that has been idle longest, one without any request first; where all
        work, refuse ours."""
        others = [
            each
            for each in self.connections
            if isinstance(each, DirectProtocol) and each is not self
        ]
        idle = [each for each in others if not (each._busy or each.transport.is_closing())]
        if idle:
            min(idle, key=lambda each: (each.cycle is not None, each._idle_since)).transport.close()
        else:
            self.app = _Crowded(self.app)

    def _give(self, seconds: float | None) -> None:
        """The connection is closed in so many seconds; None: it may stay."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._overdue)

    def _overdue(self) -> None:
        self._timer = None
        if self._busy:  # half a head waits behind a request that has not been answered
            self._give(HEAD_S)
        elif self._unseen and not self._in_message:
            self._refuse(
                ServiceError(
                    "SLOW_REQUEST", f"the request's headers did not come within {HEAD_S:g} s"
                )
            )
        else:
            self.transport.close()

    def _refuse(self, error: ServiceError) -> None:
        """Answer outside of any request, and close."""
        if not (self._busy or self.transport.is_closing()):
            body = json_bytes({"error": error.body()})
            head = (
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: "
                "close\r\n\r\n"
            )
            self.transport.write(STATUS_LINE[error.kind.status] + head.encode() + body)
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal or ServiceError("MALFORMED", msg))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_answer(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._watch_answer(None)
        super().resume_writing()

    def _watch_answer(self, left: int | None) -> None:
        """``left`` bytes wait for the client to take them; None: it has taken enough."""
        if self._stall is not None:
            self._stall.cancel()
        self._stall = None if left is None else self.loop.call_later(STALL_S, self._stalled, left)

    def _stalled(self, before: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left > before - STALL_BYTES:
            self.transport.abort()
        else:
            self._watch_answer(left)

    # -- messages

    def make_parser(self) -> httptools.HttpRequestParser:
        """A parser at the start of a request, as uvicorn makes it."""
        parser = httptools.HttpRequestParser(self)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return parser

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        self._give(HEAD_S)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value) + 4)
        if not self._in_message:  # what follows a chunked body is nobody's
            super().on_header(name, value)

    def _count_head(self, nbytes: int) -> None:
        self._head_bytes += nbytes
        if self._head_bytes > HEAD_BYTES:
            self._refusal = _head_too_large()
            raise self._refusal

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._give(None)
        self._unseen, self._in_message = 0, True
        lengths = [int(value) for name, value in self.headers if name == b"content-length"]
        self._body = None
        if lengths and self.scheme == "http" and not self.parser.should_upgrade():
            self._body = DirectBody(self, self.cycle, lengths[0])
            self.scope["extensions"] = {_EXTENSION: self._body}  # type: ignore[dict-item]

    def on_body(self, body: bytes) -> None:
        self._unseen = 0
        if self._body is not None:
            self._body.parsed(len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._ended()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._idle_since = time.monotonic()
        if self._in_message:
            self._give(HEAD_S)

    def _ended(self) -> None:
        """All of a request has come. uvicorn has no limit for a connection whose answer went
        before."""
        self._unseen, self._in_message = 0, False
        self._give(None if self._busy else float(self.timeout_keep_alive))

    def go_on_after(self, unwanted: int) -> None:
        """A taken body has ended, ``unwanted`` bytes of it unread: those are dropped, and then
        comes the next request."""
        self._unwanted = unwanted
        if self.parser is None or self.transport.is_closing():
            return
        if not unwanted:
            self.on_message_complete()
        self.flow.resume_reading()

    def data_received(self, data: bytes) -> None:
        if self._unwanted:
            dropped = min(self._unwanted, len(data))
            self._unwanted -= dropped
            data = data[dropped:]
            if not self._unwanted:
                self._ended()
        if not data:
            return
        if not self._in_message and not self._unseen:
            self._give(HEAD_S)
        self._unseen += len(data)
        super().data_received(data)
        if self._unseen > HEAD_BYTES:
            self._refuse(_head_too_large())


class _Crowded:
    """Answers on a connection too many: how the service is, and to everything else that it must
    come again."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in ALWAYS_ANSWERED:
            await self._app(scope, receive, send)
            return
        busy = ServiceError("GATEWAY_BUSY", "too many connections are at work; try again shortly")
        answer = json_response({"error": busy.body()}, busy.kind.status, {"Connection": "close"})
        await answer(scope, receive, send)


def _head_too_large() -> ServiceError:
    return ServiceError(
        "HEADERS_TOO_LARGE", f"the request's headers have more than {HEAD_BYTES} bytes"
    )


def direct_body(request: Request) -> DirectBody | None:
    """What of the body may be taken straight from the connection, None where all of it has come or
    must come by ASGI."""
    body: DirectBody | None = request.scope.get("extensions", {}).get(_EXTENSION)
    return body if body is not None and body.offered else None
