"""A service of a few lines on a real socket: it answers from a script, and can be as bad as
networks are."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from nexrl_client import testing


@dataclass
class Reply:
    """One scripted answer. drop closes the connection instead; cut sends only so many bytes of the
    body."""

    status: int = 200
    content: object = field(default_factory=lambda: {"status": "success"})
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    read_bytes_s: float = 0.0
    drop: bool = False
    cut: int | None = None

    @property
    def body(self) -> bytes:
        return (
            self.content if isinstance(self.content, bytes) else json.dumps(self.content).encode()
        )


class ScriptedServer:
    """Replies in order; the last one is given again and again."""

    def __init__(self) -> None:
        self.script: list[Reply] = [Reply()]
        self.seen: list[testing.Recorded] = []
        self.connections = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                outer.connections += 1
                super().setup()

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except OSError:  # the client went away
                    self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

            def _serve(self) -> None:
                reply = outer.next_reply()
                body = self._read(reply)
                parts = urlsplit(self.path)
                headers = {name.lower(): value for name, value in self.headers.items()}
                outer.seen.append(
                    testing.Recorded(
                        self.command, parts.path, dict(parse_qsl(parts.query)), headers, body
                    )
                )
                time.sleep(reply.delay_s)
                if reply.drop:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self._answer(reply)

            def _read(self, reply: Reply) -> bytes:
                left = int(self.headers.get("Content-Length", 0))
                pieces = []
                while left:
                    pieces.append(self.rfile.read(min(left, 1024 * 1024)))
                    if not pieces[-1]:
                        raise ConnectionError("the client went away in its body")
                    left -= len(pieces[-1])
                    time.sleep(reply.read_bytes_s)
                return b"".join(pieces)

            def _answer(self, reply: Reply) -> None:
                self.send_response(reply.status)
                for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(reply.body)))
                self.end_headers()
                self.wfile.write(reply.body[: reply.cut])
                if reply.cut is not None:
                    self.close_connection = True

            do_GET = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815 - http.server's names

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        # Small, so that a slow reader is felt by the sender; accepted connections inherit it.
        self._server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()

    def next_reply(self) -> Reply:
        with self._lock:
            return self.script.pop(0) if len(self.script) > 1 else self.script[0]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def frame_reply(
    tensors: Mapping[str, Any], metrics: Mapping[str, Any], meta_info: Mapping[str, Any]
) -> Reply:
    """A finished batch operation's answer."""
    response = testing.result_response(tensors, metrics, meta_info)
    return Reply(
        response.status, bytes(response.body), {"Content-Type": response.headers["content-type"]}
    )


def error_reply(code: str, message: str = "no", **details: Any) -> Reply:
    """A refusal as the service words it, without Retry-After."""
    response = testing.error_response(code, message, **details)
    return Reply(response.status, bytes(response.body))
