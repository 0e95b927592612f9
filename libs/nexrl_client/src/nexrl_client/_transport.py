"""A Transport makes one HTTP exchange, without retries. HTTPTransport makes it with requests."""

from __future__ import annotations

import encodings.idna  # noqa: F401 - now, and not by the first connection, which a fork may interrupt
import os
import re
import ssl
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import BadStatusLine, RemoteDisconnected
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
import requests
import urllib3.exceptions
from nexrl_contract.names import REQUEST_ID_HEADER, is_loopback, without_password
from requests.utils import get_environ_proxies, select_proxy

from .errors import (
    ClientClosed,
    InvalidAnswer,
    InvalidURL,
    ServiceFault,
    ServiceTimeout,
    Unreachable,
)

CONNECT_TIMEOUT_S = 10.0
CHUNK_BYTES = 1024 * 1024
"""One send() each: the socket's time-out is per send, so a slow line needs small ones."""


class Body:
    """A request body that can be sent again: iterating yields chunks, len() is the bytes.

    on_bytes hears of each chunk that was sent, and of a restart as a negative number.
    """

    def __init__(
        self, views: Sequence[bytes | memoryview], on_bytes: Callable[[int], object] | None = None
    ) -> None:
        self._views = [memoryview(view).cast("B") for view in views if len(view)]
        self._on_bytes = on_bytes or (lambda _: None)
        self._sent = 0
        self._seconds = 0.0

    def __len__(self) -> int:
        return sum(view.nbytes for view in self._views)

    def __iter__(self) -> Iterator[memoryview]:
        self._on_bytes(-self._sent)
        self._sent = 0
        start = time.monotonic()
        for view in self._views:
            for position in range(0, view.nbytes, CHUNK_BYTES):
                chunk = view[position : position + CHUNK_BYTES]
                yield chunk
                self._sent += chunk.nbytes
                self._on_bytes(chunk.nbytes)
                self._seconds = time.monotonic() - start

    def take_seconds(self) -> float:
        """How long sending took since the last call of this."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request; path is below the base URL, headers are as sent, connect_s is how long
    connecting may take."""

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Body | None = None
    connect_s: float = CONNECT_TIMEOUT_S


@dataclass(frozen=True, slots=True)
class Response:
    """One HTTP answer, whole; header names are in lower case, body is writable memory of its own.

    source says for messages who answered, as far as that is known.
    """

    status: int
    headers: Mapping[str, str]
    body: memoryview
    source: str = "the service's address"


class Transport(Protocol):
    """What carries requests: give your own to HTTPTrainServiceClient(transport=...).

    nexrl_client.testing has one for tests.
    """

    def send(self, request: Request, silence_s: float) -> Response:
        """Answer any status. Raises Unreachable, or ServiceTimeout after silence_s seconds without
        an answer."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...


class HTTPTransport:
    """Requests below base_url, made with the library requests.

    Threads may share it: each exchange has a session to itself, kept for the next one.
    A forked child has connections of its own, and leaves its parent's alone. Every answer is
    checked to be of the request that was sent: what another one was answered is never returned.
    """

    def __init__(self, base_url: str) -> None:
        self.base_url = normalise_url(base_url)
        # Proxy settings of the environment are for the world outside; a proxy's own loopback is not
        # ours.
        self._trust_env = not is_loopback(urlsplit(self.base_url).hostname or "")
        # Without a lock: one that another thread held at a fork would stay held in the child.
        self._idle: deque[requests.Session] = deque()
        self._closed = False
        _transports.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return HTTPTransport, (self.base_url,)

    def send(self, request: Request, silence_s: float) -> Response:
        """One exchange over a kept connection; see Transport."""
        try:
            with self._session() as session:
                return self._exchange(session, request, silence_s)
        except ServiceFault:
            raise
        except (requests.exceptions.ReadTimeout, urllib3.exceptions.ReadTimeoutError) as error:
            message = (
                f"{request.method} {self.base_url}{request.path} was not answered within "
                f"{silence_s:.1f} s"
            )
            raise ServiceTimeout(message + self._by_proxy()) from error
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
            raise InvalidURL(
                f"{self.base_url}{self._by_proxy()} is no address that can be used: {error}"
            ) from error
        except (
            requests.exceptions.RequestException,
            urllib3.exceptions.HTTPError,
            OSError,
        ) as error:
            raise self._fault(error) from error

    def close(self) -> None:
        """Close the kept connections, and those in use once their exchange ends; later calls raise
        ClientClosed."""
        self._closed = True
        self._close_idle()

    def forget_connections(self) -> None:
        """Leave the kept connections to the process that this one was forked from: here only
        descriptors are closed."""
        self._idle = deque()

    def _exchange(self, session: requests.Session, request: Request, silence_s: float) -> Response:
        mark = uuid.uuid4().hex
        with session.request(
            request.method,
            self.base_url + request.path,
            params=dict(request.query),
            headers={**request.headers, REQUEST_ID_HEADER: mark},
            data=request.body,  # type: ignore[arg-type]  # it takes whatever the socket takes
            timeout=(request.connect_s, silence_s),
            allow_redirects=False,
            stream=True,
        ) as answer:
            headers = {name.lower(): value for name, value in answer.headers.items()}
            if headers.get(REQUEST_ID_HEADER.lower(), mark) != mark:  # a proxy's own page has none
                raise Unreachable(
                    f"{request.method} {self.base_url}{request.path} got the answer of another "
                    f"request{self._by_proxy()}: a proxy mixed them up, or kept an old one"
                )
            return Response(answer.status_code, headers, _read(answer), self._source(headers))

    @contextmanager
    def _session(self) -> Iterator[requests.Session]:
        """A session that no other thread has; kept for the next exchange unless this one went
        wrong."""
        if self._closed:
            raise ClientClosed("the client is closed; make a new one")
        idle = self._idle
        try:
            session = idle.pop()
        except IndexError:
            session = requests.Session()
            session.trust_env = self._trust_env
            session.headers["Accept-Encoding"] = "identity"
        try:
            yield session
        except BaseException:
            session.close()
            raise
        self._keep(session, idle)

    def _keep(self, session: requests.Session, idle: deque[requests.Session]) -> None:
        idle.append(session)
        if self._closed:  # by another thread, during this exchange or since the line above
            self._close_idle()

    def _close_idle(self) -> None:
        while True:
            try:
                self._idle.pop().close()
            except IndexError:
                return

    def _fault(self, error: Exception) -> ServiceFault:
        """What a lost or impossible connection is; what repeating cannot change is an
        InvalidAnswer."""
        cause = _innermost(error)
        said = f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__
        no_tls = getattr(cause, "reason", "") == "WRONG_VERSION_NUMBER"
        if no_tls or isinstance(cause, ssl.SSLCertVerificationError):
            return InvalidAnswer(
                f"no TLS with {self.base_url}{self._by_proxy()} ({said}); is it the service's "
                "address?"
            )
        tunnel = re.search(r"Tunnel connection failed: (\d+)", said)
        if tunnel is not None and int(tunnel[1]) not in (429, 502, 503, 504):
            return InvalidAnswer(
                f"the proxy {self._proxy()} refuses to lead to {self.base_url} ({said[:200]})"
            )
        if isinstance(cause, BadStatusLine) and not isinstance(cause, RemoteDisconnected):
            return InvalidAnswer(
                f"what answers at {self.base_url}{self._by_proxy()} speaks no HTTP ({said[:200]})"
            )
        return Unreachable(
            f"no connection to {self.base_url}{self._by_proxy()}, or it broke ({said}); is the "
            "service running?"
        )

    def _by_proxy(self) -> str:
        proxy = self._proxy()
        return f" by way of the proxy {proxy}" if proxy else ""

    def _source(self, headers: Mapping[str, str]) -> str:
        if proxy := self._proxy():
            return f"the proxy {proxy}, or what is behind it,"
        server = headers.get("server", "")[:60]
        return f"{self.base_url}" + (f" ({server})" if server else "")

    def _proxy(self) -> str | None:
        """The proxy that the environment sets for base_url."""
        if not self._trust_env:
            return None
        url = select_proxy(self.base_url, get_environ_proxies(self.base_url))
        return without_password(url) if url else None


_transports: weakref.WeakSet[HTTPTransport] = weakref.WeakSet()


def _after_fork() -> None:
    for transport in list(_transports):
        transport.forget_connections()


os.register_at_fork(after_in_child=_after_fork)


def normalise_url(text: str) -> str:
    """The URL with a scheme (http where there is none) and without a trailing slash; raises
    InvalidURL."""
    url = text.strip()
    url = (url if "://" in url else f"http://{url}").rstrip("/")
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise InvalidURL(
            f"{text!r} is no address of a service; give one such as http://localhost:8000"
        )
    return url


def _read(answer: requests.Response) -> memoryview:
    """The whole body in one buffer that belongs to the caller; tensors may be views of it."""
    length = answer.headers.get("Content-Length")
    if length is None or "Content-Encoding" in answer.headers:
        grown = bytearray()
        for chunk in answer.iter_content(CHUNK_BYTES):
            grown += chunk
        return memoryview(grown)
    view = np.empty(int(length), np.uint8).data if int(length) else memoryview(b"")
    position = 0
    while position < len(view):
        got = answer.raw.readinto(view[position : position + CHUNK_BYTES])
        if not got:
            raise urllib3.exceptions.ProtocolError(
                f"the answer ended after {position} of {len(view)} bytes"
            )
        position += got
    return view


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return error
