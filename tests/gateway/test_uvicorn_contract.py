"""``direct`` overrides callbacks of uvicorn 0.54's HttpToolsProtocol and handles the state of its
connections: each must still be there, and be what it is taken for."""

from __future__ import annotations

import asyncio
import inspect

import httptools
import pytest
import uvicorn
from nexrl_gateway.direct import DirectProtocol
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.server import ServerState

OURS = {"make_parser", "go_on_after"}
OVERRIDDEN = sorted(
    name
    for name, value in vars(DirectProtocol).items()
    if name not in OURS and not name.startswith("_") and inspect.isfunction(value)
)


async def nothing(scope: object, receive: object, send: object) -> None:
    """The application."""


def protocol() -> DirectProtocol:
    """One whose connection has not been made."""
    config = uvicorn.Config(nothing, limit_concurrency=3)
    config.load()
    return DirectProtocol(
        config=config, server_state=ServerState(), app_state={}, _loop=asyncio.new_event_loop()
    )


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_what_the_protocol_overrides_is_still_uvicorns(name: str) -> None:
    theirs = inspect.signature(getattr(HttpToolsProtocol, name))

    assert list(inspect.signature(getattr(DirectProtocol, name)).parameters) == list(
        theirs.parameters
    )


def test_a_connection_has_the_state_that_the_protocol_handles() -> None:
    made = protocol()

    assert made.limit_concurrency is None  # ours from here on
    assert isinstance(made.connections, set)
    assert made.cycle is None
    assert isinstance(made.timeout_keep_alive, int)
    assert isinstance(made.parser, httptools.HttpRequestParser)
    assert {"flow", "transport", "scope", "headers", "scheme", "app", "loop"} <= set(vars(made))
    made.loop.close()


@pytest.mark.parametrize("name", ["pause_reading", "resume_reading"])
def test_the_flow_of_a_connection_can_be_stopped(name: str) -> None:
    assert callable(getattr(FlowControl, name))


@pytest.mark.parametrize(
    "name", ["body", "disconnected", "response_complete", "waiting_for_100_continue"]
)
def test_a_cycle_has_the_state_that_the_protocol_handles(name: str) -> None:
    assert f"self.{name}" in inspect.getsource(RequestResponseCycle.__init__)


def test_a_parser_is_made_as_uvicorn_makes_it() -> None:
    source = inspect.getsource(HttpToolsProtocol.__init__)

    assert "httptools.HttpRequestParser(self)" in source
    assert "set_dangerous_leniencies(lenient_data_after_close=True)" in source


def test_a_status_line_is_bytes_with_its_end() -> None:
    assert STATUS_LINE[431].startswith(b"HTTP/1.1 431 ")
    assert STATUS_LINE[431].endswith(b"\r\n")
