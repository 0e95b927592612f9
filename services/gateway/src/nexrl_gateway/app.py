"""The application: who may ask it, its routes, and what lives as long as the process.

Programs may ask, and pages of the gateway's own origin, under a name that is the gateway's. A
browser carries the requests of any page to this machine, bodiless ones without asking, and whoever
owns a domain may point its name here (DNS rebinding), so that his page's origin looks like ours. An
address in ``Host`` cannot be pointed elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from importlib.metadata import version
from ipaddress import IPv6Address, ip_address

import redis
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import FastAPI
from nexrl_contract.errors import ServiceError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from nexrl_gateway import upkeep
from nexrl_gateway.openapi import with_examples
from nexrl_gateway.responses import add_error_handlers, error_response, marked
from nexrl_gateway.routes import operations, payloads, status
from nexrl_gateway.services import Services
from nexrl_gateway.settings import Settings
from nexrl_gateway.strict_json import JSON

_DESCRIPTION = """\
Training of language models on worker groups: make a group, load a model, send batches.

Every operation answers when it is done; `Prefer: respond-async` answers 202 with a job to ask for.
An `Idempotency-Key` makes a repeated request the same job. Errors have one shape: `{"error":
{"code", "message", ...}}`. Whatever is asked, pages of another origin get 403, another `Host` 421,
and a request whose bytes stop coming 408."""
_AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9_.-]+))(:[0-9]{0,5})?")
_OWN_FETCHES = ("same-origin", "none")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_log = logging.getLogger(__name__)


class _Application(FastAPI):
    """FastAPI, whose answers say which request they are of, and whose page has examples."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await super().__call__(
            scope, receive, marked(scope, send) if scope["type"] == "http" else send
        )

    def openapi(self) -> JSON:
        if not self.openapi_schema:
            self.openapi_schema = with_examples(super().openapi())
        return self.openapi_schema


def create_app(settings: Settings) -> FastAPI:
    """A gateway that its lifespan starts and ends. Several may live in one process."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services = Services.start(settings)
        app.state.services = services
        tasks = [asyncio.create_task(work) for work in _upkeep(services)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await services.close()

    app = _Application(
        title="NexRL Training Service",
        version=version("nexrl-gateway"),
        description=_DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.add_middleware(OwnOrigin, settings=settings)
    add_error_handlers(app)
    for router in (operations.router, operations.jobs, payloads.router, status.router):
        app.include_router(router)
    return app


def _upkeep(services: Services) -> tuple[Coroutine[None, None, None], ...]:
    settings, ledger, watch = services.settings, services.ledger, services.watch
    lost = upkeep.LostGroups(ledger)

    def clean() -> None:
        upkeep.sweep(settings, ledger, services.store)
        lost.look()

    period_s = upkeep.sweep_period_s(settings)
    return (
        _repeat("janitor", period_s, clean, lost.forget),
        _repeat("watch", upkeep.WATCH_PERIOD_S, watch.look, watch.forget, services.room.looking),
    )


async def _repeat(
    name: str,
    period_s: float,
    look: Callable[[], None],
    forget: Callable[[], None],
    threads: CapacityLimiter | None = None,
) -> None:
    """Look once a period until cancelled; a store or Redis that is away is tried again the next
    time, and what was seen before is forgotten."""
    while True:
        try:
            await run_sync(look, limiter=threads)
        except (redis.exceptions.RedisError, ServiceError) as error:
            forget()
            _log.warning("%s.failed error=%s", name, error)
        except Exception:  # one record that cannot be read must not end the looking for good
            forget()
            _log.exception("%s.failed", name)
        await asyncio.sleep(period_s)


class OwnOrigin:
    """ASGI middleware: refuses, on every verb, foreign pages and hosts that are not ours;
    ``settings`` names further hosts."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        names = {"localhost", _canonical(settings.host.lower()), *settings.allowed_hosts}
        if not settings.on_loopback:
            names.add(socket.gethostname().lower())
        self._hosts = frozenset(names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except ServiceError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        hosts = [value.strip().lower() for value in headers.getlist("host")]
        if len(hosts) > 1 or (not hosts and scope["http_version"] != "1.0"):
            raise ServiceError("MALFORMED", f"a request has one Host header, not {len(hosts)}")
        served = str((scope.get("server") or ("",))[0])
        if hosts and not self._is_ours(hosts[0], served):
            raise _host_refused(hosts[0])
        if headers.get("sec-fetch-site", "none").lower() not in _OWN_FETCHES:
            raise _foreign(headers.get("origin", f"{headers['sec-fetch-site']} pages"))
        for origin in headers.getlist("origin"):
            if not hosts or not _same(origin.lower(), hosts[0]):
                raise _foreign(origin)

    def _is_ours(self, authority: str, served: str) -> bool:
        """Whether ``authority`` names loopback, the address at which the request came in, or a host
        of the list."""
        parts = _AUTHORITY.fullmatch(authority)
        if parts is None:
            return False
        host = _canonical(parts[1] or parts[2].removesuffix("."))
        if _is_loopback(host) or host == _canonical(served) or self._hosts & {host, "*"}:
            return True
        return any(host.endswith(name[1:]) for name in self._hosts if name.startswith("*."))


def _canonical(host: str) -> str:
    """One text for every spelling of an address; names stay as they are."""
    try:
        address = ip_address(host)
    except ValueError:
        return host
    return str((address.ipv4_mapped if isinstance(address, IPv6Address) else None) or address)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _same(origin: str, host: str) -> bool:
    """Whether a page of ``origin`` was served under ``host``; behind a proxy that ends TLS its
    scheme is another one."""
    scheme, _, authority = origin.partition("://")
    port = _DEFAULT_PORTS.get(scheme)
    return port is not None and authority.removesuffix(port) == host.removesuffix(port)


def _host_refused(host: str) -> ServiceError:
    message = (
        f"this gateway does not answer for Host {host[:100]!a}, only for loopback and the address "
        "it serves; where the name is its own, list it in NEXRL_ALLOWED_HOSTS (comma-separated) of "
        "the gateway"
    )
    return ServiceError("HOST_REFUSED", message)


def _foreign(origin: str) -> ServiceError:
    message = (
        f"a browser sent this for {origin[:100]!a}, and only programs and this gateway's own pages "
        "may ask it; type its address into the browser, or call it from a program"
    )
    return ServiceError("FOREIGN_ORIGIN", message)
