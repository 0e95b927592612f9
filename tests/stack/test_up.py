"""``nexrl up``: one line, everything restarted, nothing left behind."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
import requests

from tests.helpers.servers import RedisServer, wait_until

pytestmark = pytest.mark.timeout(180)
StartStack = Callable[..., Any]


def test_ready_line_restarts_and_clean_stop(start_stack: StartStack) -> None:
    """One line on stdout once all are ready; what dies is started again; Ctrl-C ends all."""
    stack = start_stack("--checkpointers", "2").until_ready()
    assert re.fullmatch(r"nexrl ready http://127\.0\.0\.1:\d+\n", stack.out)
    assert requests.get(f"{stack.url}/ready", timeout=5).status_code == 200
    health = stack.status()
    assert len(health["agents"]) == 1
    assert len(health["checkpointers"]) == 2

    for module in ("nexrl_gateway", "valkey-server"):
        _kill_and_wait_for_another(stack, module)
    wait_until(lambda: _ready(stack.url), 30, "a gateway that is ready again")
    assert "gateway died (signal SIGKILL)" in stack.err
    assert "redis died (signal SIGKILL)" in stack.err

    assert stack.stop(signal.SIGINT) == 0
    assert stack.processes() == []
    assert stack.out.count("\n") == 1
    assert "killed" not in stack.err


@pytest.mark.slow
def test_killed_outright_it_leaves_no_process(start_stack: StartStack) -> None:
    """kill -9 of ``nexrl up`` takes every process of the stack with it, and the folder can be used
    again at once."""
    stack = start_stack().until_ready()
    assert len(stack.processes()) >= 4
    stack.process.kill()
    stack.process.wait()
    wait_until(lambda: not stack.processes(), 5, "the end of all processes")
    assert start_stack().until_ready().stop(signal.SIGTERM) == 0


@pytest.mark.slow
def test_records_outlive_the_stack_until_fresh(start_stack: StartStack) -> None:
    """The same folder brings the records back; --fresh forgets them and leaves the user's files
    alone."""
    stack = start_stack().until_ready()
    redis.Redis.from_url(stack.redis_url).set("nexrl:test:kept", "yes")
    (stack.data / "checkpoint").write_text("mine")
    assert stack.stop() == 0

    stack = start_stack().until_ready()
    assert redis.Redis.from_url(stack.redis_url).get("nexrl:test:kept") == b"yes"
    assert stack.stop() == 0

    stack = start_stack("--fresh").until_ready()
    assert redis.Redis.from_url(stack.redis_url).get("nexrl:test:kept") is None
    assert (stack.data / "checkpoint").read_text() == "mine"


def test_data_folder_in_use_is_refused(shared_stack: Any, nexrl: Callable[..., Any]) -> None:
    """A second stack on the same folder is refused before it starts anything, and the first one
    goes on."""
    stack = shared_stack
    before = {process.pid for process in stack.processes()}
    second = nexrl("up", "--port", "0", "--fresh", "--data", str(stack.data))
    assert second.returncode == 1
    assert f"is in use by another `nexrl up` (process {stack.process.pid})" in second.stderr
    assert second.stdout == ""
    assert {process.pid for process in stack.processes()} == before
    assert requests.get(f"{stack.url}/ready", timeout=5).status_code == 200


def test_port_in_use_is_refused(tmp_path: Path, nexrl: Callable[..., Any]) -> None:
    """A port that is taken is refused with its number before anything is started."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = nexrl("up", "--port", str(port), "--data", str(tmp_path / "data"))
    assert refused.returncode == 1
    assert f"port {port} on 127.0.0.1 cannot be used" in refused.stderr
    assert not (tmp_path / "data" / ".nexrl" / "redis").exists()


def test_redis_that_is_away_is_refused(tmp_path: Path, nexrl: Callable[..., Any]) -> None:
    """A Redis given with --redis must answer."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    refused = nexrl(
        "up",
        "--redis",
        f"redis://127.0.0.1:{port}/0",
        "--port",
        "0",
        "--data",
        str(tmp_path / "data"),
    )
    assert refused.returncode == 1
    assert "no Redis answers at --redis" in refused.stderr


def test_external_redis_is_used_and_left_running(
    start_stack: StartStack, tmp_path: Path, nexrl: Callable[..., Any]
) -> None:
    """With --redis no embedded server is started, the given one is not stopped, and one that would
    forget is refused."""
    server = RedisServer(tmp_path)
    server.start("--appendonly", "no")
    refused = nexrl("up", "--redis", server.url, "--port", "0", "--data", str(tmp_path / "data"))
    assert refused.returncode == 1
    assert "CONFIG SET appendonly yes" in refused.stderr
    client = redis.Redis.from_url(server.url)
    client.config_set("appendonly", "yes")
    stack = start_stack("--redis", server.url).until_ready()
    assert _pid_of(stack, "valkey-server") is None
    assert stack.stop() == 0
    assert client.ping()
    server.kill()


@pytest.mark.slow
def test_a_process_that_cannot_live_ends_the_stack_with_its_log(start_stack: StartStack) -> None:
    """Five deaths right after the start: the end of the log on stderr, exit status 1, no process
    left."""
    stack = start_stack("--payloads", "nonsense://nowhere")
    assert stack.process.wait(60) == 1
    assert "died 5 times right after its start" in stack.err
    assert "the payload store must be" in stack.err
    assert stack.processes() == []
    assert stack.out == ""


def _kill_and_wait_for_another(stack: Any, module: str) -> None:
    victim = stack.process_of(module)
    old = victim.pid
    victim.kill()
    wait_until(lambda: _pid_of(stack, module) not in (None, old), 10, f"another {module}")


def _pid_of(stack: Any, module: str) -> int | None:
    return next((process.pid for process in stack.running(module)), None)


def _ready(url: str) -> bool:
    try:
        return requests.get(f"{url}/ready", timeout=2).status_code == 200
    except requests.RequestException:
        return False


@pytest.mark.parametrize("how", ["middle", "base", "manifest"])
def test_damaged_records_are_told_with_what_to_do(
    how: str, tmp_path: Path, nexrl: Callable[..., Any]
) -> None:
    """At once, with the file; the offered command mends what can be mended with what is installed,
    and --fresh begins anew."""
    records = _records(tmp_path / "data")
    file = {
        "middle": records / "appendonly.aof.1.incr.aof",
        "base": records / "appendonly.aof.1.base.rdb",
        "manifest": records / "appendonly.aof.manifest",
    }[how]
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 20] = bytes(20)
    file.write_bytes(content)

    refused = nexrl("up", "--port", "0", "--data", str(tmp_path / "data"))

    assert refused.returncode == 1
    assert str(records) in refused.stderr
    assert "--fresh" in refused.stderr
    assert file.read_bytes() == bytes(content)
    offered = re.search(r"bash -c '.*'", refused.stderr)
    assert (offered is not None) == (how == "middle")
    if offered is not None:
        assert str(file) in refused.stderr
        subprocess.run(shlex.split(offered[0]), input=b"y\n", check=True, timeout=30)
        server = RedisServer(records.parent)
        server.start()
        kept = redis.Redis.from_url(server.url)
        assert 0 < kept.dbsize() < 500
        kept.close()
        server.kill()


def test_a_tail_that_a_crash_cut_off_is_no_damage(start_stack: StartStack, tmp_path: Path) -> None:
    """What was not written whole was not acknowledged: the stack starts by itself."""
    data = tmp_path / "cut"
    file = _records(data) / "appendonly.aof.1.incr.aof"
    os.truncate(file, file.stat().st_size - 7)
    stack = start_stack(data=data).until_ready()
    with redis.Redis.from_url(stack.redis_url) as client:
        assert (client.exists("key498"), client.exists("key499")) == (1, 0)
    assert stack.stop() == 0


def _records(data: Path) -> Path:
    """Five hundred keys in an embedded server's folder; the folder of its files."""
    folder = data / ".nexrl" / "redis"
    folder.mkdir(parents=True)
    server = RedisServer(folder)
    server.start()
    with redis.Redis.from_url(server.url) as client:
        for number in range(500):
            client.set(f"key{number}", number)
    server.kill()
    return folder / "appendonlydir"
