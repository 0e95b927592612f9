"""The one seam: a Transport makes one HTTP exchange, without retries. HTTPTransport does it with requests."""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
import requests
import urllib3.exceptions

from ._body import CHUNK_BYTES, Body
from .errors import ClientClosed, InvalidURL, ServiceTimeout, Unreachable

CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request; path is below the base URL, headers are as sent, connect_s is how long connecting may take."""

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Body | None = None
    connect_s: float = CONNECT_TIMEOUT_S


@dataclass(frozen=True, slots=True)
class Response:
    """One HTTP answer, whole; header names are in lower case, body is writable memory of its own."""

    status: int
    headers: Mapping[str, str]
    body: memoryview


class Transport(Protocol):
    """What carries requests. Give your own to HTTPTrainServiceClient(transport=...); see nexrl_client.testing."""

    def send(self, request: Request, silence_s: float) -> Response:
        """Answer any status. Raises Unreachable, or ServiceTimeout after silence_s seconds without an answer."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...


class HTTPTransport:
    """Requests below base_url. Threads may share it: each exchange has a session to itself, kept for the next one."""

    def __init__(self, base_url: str) -> None:
        self.base_url = normalise_url(base_url)
        # Proxy settings of the environment are for the world outside; a proxy's own loopback is not ours.
        self._trust_env = not _is_loopback(urlsplit(self.base_url).hostname or "")
        self._lock = threading.Lock()
        self._idle: list[requests.Session] = []
        self._closed = False

    def __reduce__(self) -> tuple[Any, ...]:
        return HTTPTransport, (self.base_url,)

    def send(self, request: Request, silence_s: float) -> Response:
        """One exchange over a kept connection; see Transport."""
        try:
            with self._session() as session:
                return self._exchange(session, request, silence_s)
        except (requests.exceptions.ReadTimeout, urllib3.exceptions.ReadTimeoutError) as error:
            message = f"{request.method} {self.base_url}{request.path} was not answered within {silence_s:.1f} s"
            raise ServiceTimeout(message) from error
        except requests.exceptions.InvalidURL as error:
            raise InvalidURL(f"{self.base_url} is no address: {error}") from error
        except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            message = f"no connection to {self.base_url}, or it broke ({_innermost(error)}); is the service running?"
            raise Unreachable(message) from error

    def close(self) -> None:
        """Close the kept connections, and those in use once their exchange ends; later calls raise ClientClosed."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for session in idle:
            session.close()

    def _exchange(self, session: requests.Session, request: Request, silence_s: float) -> Response:
        with session.request(
            request.method,
            self.base_url + request.path,
            params=dict(request.query),
            headers=dict(request.headers),
            data=request.body,  # type: ignore[arg-type]  # it takes whatever the socket takes
            timeout=(request.connect_s, silence_s),
            allow_redirects=False,
            stream=True,
        ) as answer:
            headers = {name.lower(): value for name, value in answer.headers.items()}
            return Response(answer.status_code, headers, _read(answer))

    @contextmanager
    def _session(self) -> Iterator[requests.Session]:
        with self._lock:
            if self._closed:
                raise ClientClosed("the client is closed; make a new one")
            session = self._idle.pop() if self._idle else None
        if session is None:
            session = requests.Session()
            session.trust_env = self._trust_env
            session.headers["Accept-Encoding"] = "identity"
        try:
            yield session
        finally:
            with self._lock:
                keep = not self._closed
                if keep:
                    self._idle.append(session)
            if not keep:
                session.close()


def normalise_url(text: str) -> str:
    """The URL with a scheme (http where there is none) and without a trailing slash; raises InvalidURL."""
    url = text.strip()
    url = (url if "://" in url else f"http://{url}").rstrip("/")
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise InvalidURL(f"{text!r} is no address of a service; give one such as http://localhost:8000")
    return url


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


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
            raise urllib3.exceptions.ProtocolError(f"the answer ended after {position} of {len(view)} bytes")
        position += got
    return view


def _innermost(error: BaseException) -> str:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
