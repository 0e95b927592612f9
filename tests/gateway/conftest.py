"""One gateway for all tests of this folder; it is stateless, so emptying Redis and its folder gives
each test a fresh one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from nexrl_contract.records import ProcessRecord
from nexrl_ledger import Ledger, connect

from tests.helpers.gateway import Gateway, PlayedGroup
from tests.helpers.servers import RedisServer


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server of the folder's own: the gateway lives on, and its janitor writes a key each minute,
    whatever is tested then."""
    server = RedisServer(tmp_path_factory.mktemp("gateway-redis"))
    server.start("--appendfsync", "no")
    yield server
    server.kill()


@pytest.fixture(scope="session")
def shared_gateway(
    redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    gateway = Gateway(
        tmp_path_factory.mktemp("gateway"),
        redis_server.url,
        NEXRL_WAIT_LIMIT_S="2",
        NEXRL_MAX_BODY_BYTES=str(300 * 1024**2),
    )
    yield gateway
    gateway.stop()


@pytest.fixture
def gateway(shared_gateway: Gateway, redis_url: str) -> Gateway:
    for path in shared_gateway.payloads.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return shared_gateway


@pytest.fixture
def ledger(redis_url: str) -> Iterator[Ledger]:
    ledger = Ledger(connect(redis_url))
    ledger.agents.beat(ProcessRecord(name="agent", host="here", slots=4, free=4))
    yield ledger
    ledger.client.close()


@pytest.fixture
def make_group(ledger: Ledger, gateway: Gateway) -> Callable[..., PlayedGroup]:
    def make(identifier: str = "student", **fields: Any) -> PlayedGroup:
        return PlayedGroup(ledger, gateway.payloads, identifier, **fields)

    return make


@pytest.fixture
def group(make_group: Callable[..., PlayedGroup]) -> PlayedGroup:
    """A ready group ``student`` with the default policy loss."""
    return make_group()
