"""``nexrl status|jobs|logs|checkpoints``: what they show, and what they say when they cannot."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from nexrl_host.processes import rotate_logs
from nexrl_stack import views
from nexrl_stack.views import rank_lines
from nexrl_storage.manifest import Manifest, describe, write_manifest

from tests.helpers.proxy import little_proxy
from tests.helpers.servers import free_port

pytestmark = pytest.mark.timeout(180)
Nexrl = Callable[..., CompletedProcess[str]]


def test_status_and_jobs_of_an_empty_stack(shared_stack: Any, nexrl: Nexrl) -> None:
    """Tables for people and JSON for programs, both of a real gateway."""
    stack = shared_stack
    shown = nexrl("status", "--url", stack.url)
    assert shown.returncode == 0, shown.stderr
    assert "slots: 3 of 3 free" in shown.stdout
    assert "no worker groups" in shown.stdout

    status = json.loads(nexrl("status", "--url", stack.url, "--json").stdout)
    assert status["status"] == "healthy"
    assert status["slots"] == {"total": 3, "free": 3}
    assert status["groups"] == []

    assert nexrl("jobs", "--url", stack.url).stdout == "no jobs\n"
    assert json.loads(nexrl("jobs", "--url", stack.url, "--json").stdout) == {"jobs": []}


@pytest.mark.parametrize("command", ["status", "jobs"])
def test_gateway_that_does_not_answer(command: str, nexrl: Nexrl) -> None:
    """Exit status 1 and a message that says what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    answer = nexrl(command, "--url", url)
    assert answer.returncode == 1
    assert f"no gateway answers at {url}; start one with `nexrl up`" in answer.stderr
    assert answer.stdout == ""


@pytest.mark.parametrize("command", ["status", "jobs"])
def test_a_proxy_is_not_for_this_machine_and_is_named_elsewhere(
    command: str, nexrl: Nexrl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Towards loopback it is not asked; where it answers for a gateway, or is away, the message
    says so."""
    for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    away = f"http://127.0.0.1:{free_port()}"
    with little_proxy(away, tmp_path) as proxy:
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        assert f"no gateway answers at {away}" in nexrl(command, "--url", away).stderr
        assert proxy.asked == []
        answer = nexrl(command, "--url", "http://training.invalid:8000")
        assert (answer.returncode, answer.stdout) == (1, "")
        assert (
            f"the proxy {proxy.url}, asked for http://training.invalid:8000/"
            in answer.stderr.replace("\n", "")
        )
        assert len(proxy.asked) == 1
    answer = nexrl(command, "--url", "http://training.invalid:8000")
    assert answer.returncode == 1 and f"by way of the proxy {proxy.url}" in answer.stderr.replace(
        "\n", ""
    )


def test_status_by_the_names_of_loopback(
    shared_stack: Any, nexrl: Nexrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway of this machine is asked whatever proxy is set; an address needs no http://."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    port = shared_stack.url.rpartition(":")[2]
    for url in (shared_stack.url, f"localhost:{port}"):
        shown = nexrl("status", "--url", url, "--json")
        assert json.loads(shown.stdout)["status"] == "healthy", shown.stderr


def test_logs_carry_the_rank(tmp_path: Path, nexrl: Nexrl) -> None:
    """Every line of every rank, in the order of ranks (10 after 2), a last line without its end
    included."""
    folder = tmp_path / ".nexrl" / "logs" / "groups" / "student"
    folder.mkdir(parents=True)
    for rank, text in ((0, "first\nsecond\n"), (2, "two\n"), (10, "unfinished")):
        (folder / f"rank{rank}.log").write_text(text)
    answer = nexrl("logs", "student", "--data", str(tmp_path))
    assert answer.stdout.splitlines() == ["[0] first", "[0] second", "[2] two", "[10] unfinished"]


def test_logs_are_bounded_and_none_of_their_lines_is_lost(
    tmp_path: Path, nexrl: Nexrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that appends is not disturbed; whoever follows reads on, and who comes later sees
    what is kept."""
    monkeypatch.setattr(views, "_FOLLOW_S", 0.001)
    folder = tmp_path / ".nexrl" / "logs" / "groups" / "student"
    folder.mkdir(parents=True)
    followed, written = rank_lines(folder, follow=True), []
    with (folder / "rank0.log").open("ab", buffering=0) as log:
        for number in range(200):
            written.append(f"line {number}")
            log.write(f"line {number}\n".encode())
            if number % 10 == 5:
                rotate_logs(folder, 400)
            assert next(followed) == f"[0] line {number}"
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sorted(sizes) == ["rank0.log", "rank0.log.1", "rank0.log.2"]
    assert sum(sizes.values()) < 3 * 600
    shown = nexrl("logs", "student", "--data", str(tmp_path)).stdout.splitlines()
    assert shown == [f"[0] {line}" for line in written[-len(shown) :]]
    assert len(shown) > 100


@pytest.mark.parametrize(
    ("identifier", "message"), [("nobody", "there are no logs"), ("../x", "is no identifier")]
)
def test_logs_of_no_group(identifier: str, message: str, tmp_path: Path, nexrl: Nexrl) -> None:
    """An unknown group and what is no identifier are refused with a message."""
    answer = nexrl("logs", identifier, "--data", str(tmp_path))
    assert answer.returncode == 1
    assert message in answer.stderr


def test_checkpoints_lists_what_is_published(tmp_path: Path, nexrl: Nexrl) -> None:
    """Folders with a manifest under the data folder and the roots; what is not published is not
    shown."""
    data, root = tmp_path / "data", tmp_path / "root"
    for folder, step in ((data / "ckpt" / "step_1", 1), (root / "step_2", 2)):
        _publish(folder, step)
    (data / "ckpt" / "half").mkdir()
    answer = nexrl("checkpoints", "--data", str(data), "--checkpoint-root", str(root), "--json")
    found = json.loads(answer.stdout)["checkpoints"]
    assert [(item["path"], item["checkpoint"]["step"]) for item in found] == [
        (str(data / "ckpt" / "step_1"), 1),
        (str(root / "step_2"), 2),
    ]
    table = nexrl("checkpoints", "--data", str(data), "--checkpoint-root", str(root)).stdout
    assert "step_1" in table
    assert "step_2" in table
    assert "half" not in table


def test_a_root_is_written_as_a_shell_would_have_it(
    tmp_path: Path, nexrl: Nexrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shell leaves ~ alone behind --data=; a root with a colon would be read as two."""
    monkeypatch.setenv("HOME", str(tmp_path))
    _publish(tmp_path / "data" / "step_1", 1)
    answer = nexrl("checkpoints", "--data=~/data", "--checkpoint-root=~/none", "--json")
    assert [item["path"] for item in json.loads(answer.stdout)["checkpoints"]] == [
        str(tmp_path / "data" / "step_1")
    ]
    answer = nexrl("checkpoints", "--checkpoint-root", str(tmp_path / "a:b"))
    assert answer.returncode == 1 and "a:b cannot be a root" in answer.stderr


def _publish(folder: Path, step: int) -> None:
    folder.mkdir(parents=True)
    (folder / "rank0.safetensors").write_bytes(b"weights")
    manifest = Manifest(
        identifier="student",
        step=step,
        created=float(step),
        files=(describe(folder, "rank0.safetensors"),),
        job_id="0" * 32,
        seq=step,
        world_size=1,
        config_hash="0" * 16,
        weight_only=False,
    )
    write_manifest(folder, manifest)
