"""Pages of other origins and hosts that are not the gateway's are refused on every verb, over raw
connections."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.gateway import ASYNC, Gateway, PlayedGroup, refusal

DESTROY = "POST /destroy?identifier=student"
FOREIGN = {
    "another site": {"Origin": "http://evil.example"},
    "a file, or a sandboxed frame": {"Origin": "null"},
    "another port of this machine": {"Origin": "http://localhost:3000"},
    "our own name with another port": {"Origin": "http://127.0.0.1:1"},
    "no origin, but its fetch metadata": {"Sec-Fetch-Site": "cross-site"},
    "another port, by its fetch metadata": {"Sec-Fetch-Site": "same-site"},
    "two origins": {"Origin": "{own}", "origin": "http://evil.example"},
}
HOSTS = {
    "a name that was pointed here": "evil.example",
    "with a port": "evil.example:8000",
    "that begins like ours": "localhost.evil.example",
    "that begins with an address": "127.0.0.1.evil.example",
    "an address of another machine": "10.11.12.13",
    "an address as a number": "2130706433",
    "every address": "0.0.0.0",
    "nothing": "",
    "a login before it": "evil.example@127.0.0.1",
}


def ask(
    gateway: Gateway, line: str, headers: dict[str, str], host: str | None = None
) -> tuple[int, dict[str, Any]]:
    """Status and document of a request that no HTTP library has improved."""
    address, port = gateway.url.removeprefix("http://").split(":")
    own = f"{address}:{port}" if host is None else host
    lines = [f"{name}: {value.replace('{own}', gateway.url)}" for name, value in headers.items()]
    with socket.create_connection((address, int(port)), timeout=10) as client:
        client.sendall(
            "\r\n".join(
                [f"{line} HTTP/1.1", f"Host: {own}", *lines, "Connection: close", "", ""]
            ).encode()
        )
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body) if b"application/json" in head else {}


def code(answer: tuple[int, dict[str, Any]]) -> tuple[int, str | None]:
    return answer[0], answer[1].get("error", {}).get("code")


@pytest.mark.parametrize("name", FOREIGN)
def test_a_page_of_another_origin_changes_and_learns_nothing(
    name: str, gateway: Gateway, group: PlayedGroup
) -> None:
    """403 whatever the verb; the group is still there."""
    for line in (
        DESTROY,
        "GET /health",
        "GET /docs",
        "OPTIONS /destroy",
        "DELETE /jobs/x",
        "PUT /payloads/x/parts/0",
    ):
        assert code(ask(gateway, line, FOREIGN[name])) == (403, "FOREIGN_ORIGIN"), line
    assert group.waiting() == 0
    assert group.ledger.groups.identifiers() == ["student"]


@pytest.mark.parametrize("name", HOSTS)
def test_a_host_that_is_not_ours_is_refused(
    name: str, gateway: Gateway, group: PlayedGroup
) -> None:
    """421 that names the setting; with the matching origin too, as a rebound name has it."""
    for line in (DESTROY, "GET /get_models"):
        for headers in ({}, {"Origin": f"http://{HOSTS[name]}", "Sec-Fetch-Site": "same-origin"}):
            answer = ask(gateway, line, headers, HOSTS[name])
            assert code(answer) == (421, "HOST_REFUSED"), answer
            assert "NEXRL_ALLOWED_HOSTS" in answer[1]["error"]["message"]
    assert group.waiting() == 0


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:1234", "127.0.0.1", "127.8.9.10:80", "[::1]:8000", "localhost."],
)
def test_loopback_is_ours_by_every_name_and_port(
    host: str, gateway: Gateway, group: PlayedGroup
) -> None:
    """Programs send no origin; our own page sends ours."""
    assert ask(gateway, "GET /health", {}, host)[0] == 200
    own = {"Origin": f"http://{host.lower()}", "Sec-Fetch-Site": "same-origin"}
    assert ask(gateway, "POST /barrier?identifier=student", {**ASYNC, **own}, host)[0] == 202


def test_a_request_has_one_host(gateway: Gateway, redis_url: str) -> None:
    """Which of two would count depends on who reads them."""
    assert code(ask(gateway, "GET /health", {"host": "evil.example"})) == (400, "MALFORMED")
    refusal(gateway.get("/health", headers={"Host": "evil.example"}), 421, "HOST_REFUSED")


def test_the_docs_page_works_from_its_own_origin(gateway: Gateway, redis_url: str) -> None:
    """Typed into the address bar, and what it fetches then."""
    typed = {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"}
    assert ask(gateway, "GET /docs", typed)[0] == 200
    assert ask(gateway, "GET /openapi.json", {"Sec-Fetch-Site": "same-origin"})[0] == 200


def test_a_gateway_on_every_interface_answers_for_what_it_is_told(
    tmp_path: Path, redis_url: str
) -> None:
    """Its listed names, the machine's own name, and the address at which a request came in: a probe
    knows no other."""
    listed = {"NEXRL_HOST": "0.0.0.0", "NEXRL_ALLOWED_HOSTS": "gateway, *.svc.cluster.local"}
    gateway = Gateway(tmp_path, redis_url, **listed)
    try:
        for host in (
            "gateway:8000",
            "nexrl.default.svc.cluster.local",
            socket.gethostname(),
            "0.0.0.0",
            "localhost",
        ):
            assert ask(gateway, "GET /health", {}, host)[0] == 200, host
        for host in ("svc.cluster.local", "gateway.evil.example", "evil.example", "10.11.12.13"):
            assert code(ask(gateway, "GET /health", {}, host)) == (421, "HOST_REFUSED"), host
        behind_tls = {"Origin": "https://gateway", "Sec-Fetch-Site": "same-origin"}
        assert ask(gateway, "GET /health", behind_tls, "gateway")[0] == 200
    finally:
        gateway.stop()
