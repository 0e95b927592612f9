"""The service's data path with real parts: Redis, the gateway's process, a payload store, and
reading ranks."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Literal

import requests
from nexrl_client import HTTPTrainServiceClient
from nexrl_contract import names
from nexrl_contract.config import parse_config
from nexrl_contract.records import GroupRecord
from nexrl_ledger import Ledger, connect
from nexrl_stack.embedded_redis import answers, redis_service, redis_url

from benchmarks.processes import Child, Children, free_port, module

IDENTIFIER = "bench"
Store = Literal["file", "redis"]


class ServicePath:
    """Started in ``children``; its client's calls end when the ranks have read the batch."""

    def __init__(self, children: Children, name: str, store: Store, ranks: int, kind: str) -> None:
        self._children = children
        self._name = name
        self.data = children.folder / name
        self.data.mkdir()
        self.redis = self._server("ledger", append="yes")
        payloads = self._server("payloads", append="no") if store == "redis" else None
        self.payloads = payloads or f"file://{self.data}/payloads"
        self.payload_redis = payloads
        self._announce(ranks)
        self.gateway = self._gateway()
        self.ranks = self._ranks(ranks, kind)

    def client(self) -> HTTPTrainServiceClient:
        """A client of the one group."""
        return HTTPTrainServiceClient(self.url, IDENTIFIER)

    def _server(self, role: str, append: str) -> str:
        """The server of ``nexrl up``; a store for payloads needs no append-only file."""
        port = free_port()
        folder = self.data / role
        argv = [*redis_service(folder, port).argv, "--appendonly", append]
        child = self._children.start(f"{self._name}-{role}", argv)
        child.until(lambda: answers(redis_url(port)), f"Redis for the {role}")
        return redis_url(port)

    def _announce(self, ranks: int) -> None:
        """Write the group's record as an agent that has placed it would have."""
        self._config = parse_config({"actor": {"model": {"path": "none"}}}).settings()
        group = GroupRecord(
            identifier=IDENTIFIER,
            state="ready",
            world_size=ranks,
            config=self._config,
            epoch=1,
            initialised=True,
            heartbeat=time.time(),
        )
        client = connect(self.redis)
        client.hset(names.group_key(IDENTIFIER), mapping=group.to_hash())  # type: ignore[arg-type]
        client.sadd(names.GROUPS_KEY, IDENTIFIER)
        client.close()

    def _gateway(self) -> Child:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        env = {
            "NEXRL_REDIS_URL": self.redis,
            "NEXRL_DATA": str(self.data),
            "NEXRL_PAYLOADS": self.payloads,
            "NEXRL_PORT": str(port),
        }
        child = self._children.start(f"{self._name}-gateway", module("nexrl_gateway"), env)
        child.until(lambda: _ready(self.url), "the gateway")
        return child

    def _ranks(self, count: int, kind: str) -> list[Child]:
        group = {
            "identifier": IDENTIFIER,
            "epoch": 1,
            "role": "actor",
            "config": self._config,
            "seq": 0,
            "redis_url": self.redis,
            "data": str(self.data),
            "payloads": self.payloads,
            "fsync": False,
            "restore": False,
        }
        env = {
            "NEXRL_GROUP": json.dumps(group),
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        argv = module("benchmarks.reader_rank", kind)
        ranks = [
            self._children.start(f"{self._name}-rank{n}", argv, env | {"RANK": str(n)})
            for n in range(count)
        ]
        ledger = Ledger(connect(self.redis))
        ranks[0].until(
            lambda: (group := ledger.groups.get(IDENTIFIER)) is not None and group.info,
            "the reading ranks",
        )
        return ranks


def folder_of(path: ServicePath) -> Path:
    """Where a ``file://`` store keeps its payloads."""
    return path.data / "payloads"


def _ready(url: str) -> bool:
    try:
        return requests.get(f"{url}/ready", timeout=2).status_code == 200
    except requests.RequestException:
        return False
