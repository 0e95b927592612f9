"""Large bodies straight from their socket: a thread reads, checks and stores them through one kept buffer.

uvicorn hands a body over in messages that its event loop has copied four times: two thirds of an upload's time. So
:class:`DirectProtocol` (``http=`` of ``uvicorn.Config``) parses heads as uvicorn does, and offers the rest of a body of
known length in ``scope["extensions"]``; who takes it gets a second descriptor of the paused connection. Another server,
TLS or a chunked body offers nothing, and the body comes by ASGI messages.

This relies on uvicorn's ``HttpToolsProtocol`` (as of 0.54): on its callbacks, and that a connection's state is ``cycle``,
``flow`` and ``parser``. The parser is made anew for the next request, because httptools cannot be told to skip bytes.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

import anyio
import httptools
from anyio.to_thread import run_sync
from fastapi import Request
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

_EXTENSION = "nexrl.body"
_BUFFER_BYTES = 1024 * 1024
_SLICE_S = 0.05  # a stop, and others who wait for a thread, need not wait longer
_PATIENCE_S = 0.002  # going to sleep on the event loop and back costs about as much


class DirectBody:
    """The rest of one request's body; ``remaining`` bytes of it have not been handed to the application."""

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
        return self._unparsed > 0 and not self._cycle.disconnected and not self._protocol.transport.is_closing()

    async def copy(self, head: bytes | bytearray, write: Callable[[memoryview], None]) -> None:
        """Give ``head`` and then all that follows to ``write``, in a thread, in views that are valid for the call.

        Raises ClientDisconnect, and what ``write`` raises; the connection stays usable after the latter.
        """
        transport = self._protocol.transport
        descriptor = os.dup(transport.get_extra_info("socket").fileno())  # may fail, so before anything is changed
        with socket.socket(fileno=descriptor) as connection:
            self._protocol.flow.pause_reading()
            if self._cycle.waiting_for_100_continue:
                transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                self._cycle.waiting_for_100_continue = False
            here, self._cycle.body = self._cycle.body, bytearray()
            self._protocol.parser = self._protocol.make_parser()
            flow = _Flow(connection, self._unparsed, write)
            try:
                await run_sync(flow.begin, head, here)
                while not await run_sync(flow.go_on):
                    await anyio.wait_readable(connection)
            except ClientDisconnect:
                self._cycle.disconnected = True
                transport.close()
                raise
            finally:
                self._unparsed = 0
                self._protocol.go_on_after(flow.remaining)


class _Flow:
    """From a socket through a buffer, filled before it is written, to ``write``."""

    def __init__(self, connection: socket.socket, remaining: int, write: Callable[[memoryview], None]) -> None:
        connection.settimeout(_PATIENCE_S)
        self.remaining = remaining
        self._connection = connection
        self._write = write
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._filled = 0

    def begin(self, *pieces: bytes | bytearray) -> None:
        """Put what was read before in front."""
        for piece in pieces:
            view = memoryview(piece)
            while view.nbytes:
                count = min(view.nbytes, _BUFFER_BYTES - self._filled)
                self._buffer[self._filled : self._filled + count] = view[:count]
                view = view[count:]
                self._advance(count)

    def go_on(self) -> bool:
        """Take what is there; True once the whole body has been written."""
        end = time.monotonic() + _SLICE_S
        while self.remaining and time.monotonic() < end:
            try:
                count = self._connection.recv_into(self._buffer[self._filled : self._filled + self.remaining])
            except TimeoutError:
                break
            except OSError as error:
                raise ClientDisconnect from error
            if count == 0:
                raise ClientDisconnect
            self.remaining -= count
            self._advance(count)
        return self._finish()

    def _advance(self, count: int) -> None:
        self._filled += count
        if self._filled == _BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        filled, self._filled = self._filled, 0
        if filled:
            self._write(self._buffer[:filled])

    def _finish(self) -> bool:
        if self.remaining:
            return False
        self._flush()
        return True


class DirectProtocol(HttpToolsProtocol):
    """uvicorn's protocol, whose bodies of known length may be taken off the connection; see the module."""

    _body: DirectBody | None = None
    _unwanted = 0

    def make_parser(self) -> httptools.HttpRequestParser:
        """A parser at the start of a request, as uvicorn makes it."""
        parser = httptools.HttpRequestParser(self)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return parser

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        lengths = [int(value) for name, value in self.headers if name == b"content-length"]
        self._body = None
        if lengths and self.scheme == "http" and not self.parser.should_upgrade():
            self._body = DirectBody(self, self.cycle, lengths[0])
            self.scope["extensions"] = {_EXTENSION: self._body}  # type: ignore[dict-item]

    def on_body(self, body: bytes) -> None:
        if self._body is not None:
            self._body.parsed(len(body))
        super().on_body(body)

    def go_on_after(self, unwanted: int) -> None:
        """A taken body has ended, ``unwanted`` bytes of it unread: those are dropped, and then comes the next request."""
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
        if data:
            super().data_received(data)


def direct_body(request: Request) -> DirectBody | None:
    """What of the body may be taken straight from the connection, None where all of it has come or must come by ASGI."""
    body: DirectBody | None = request.scope.get("extensions", {}).get(_EXTENSION)
    return body if body is not None and body.offered else None
