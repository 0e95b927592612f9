"""A forward proxy in a process of its own: it takes every address for the one service that it
knows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from nexrl_host.processes import die_with_parent

_HOP = ("connection", "keep-alive", "proxy-connection", "transfer-encoding", "content-length")


@dataclass(frozen=True)
class LittleProxy:
    """Where it listens; what it was asked for."""

    url: str
    _log: Path

    @property
    def asked(self) -> list[str]:
        """The whole addresses, in order."""
        return self._log.read_text().splitlines()


@contextmanager
def little_proxy(target: str, folder: Path) -> Iterator[LittleProxy]:
    """A proxy whose every address leads to ``target``; where that is away it answers 502 with a
    page."""
    log = folder / "proxy.log"
    log.touch()
    process = subprocess.Popen(
        [sys.executable, __file__, target, str(log)],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent,
    )
    try:
        assert process.stdout is not None
        yield LittleProxy(f"http://127.0.0.1:{int(process.stdout.readline())}", log)
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _serve(target: str, log: Path) -> None:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

        def _pass_on(self) -> None:
            with log.open("a") as lines:
                lines.write(f"{self.path}\n")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked = urlsplit(self.path)
            path = f"{asked.path}?{asked.query}" if asked.query else asked.path
            connection = HTTPConnection(urlsplit(target).netloc, timeout=30)
            try:
                headers = {
                    name: value
                    for name, value in self.headers.items()
                    if name.lower() not in (*_HOP, "host")
                }
                connection.request(self.command, path, body, headers)
                answer = connection.getresponse()
                self._answer(answer.status, answer.getheaders(), answer.read())
            except OSError:
                self._answer(
                    502, [("Content-Type", "text/html")], b"<html>no route to the host</html>"
                )
            finally:
                connection.close()

        def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in _HOP:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_DELETE = _pass_on  # noqa: N815 - http.server's names

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    _serve(sys.argv[1], Path(sys.argv[2]))
