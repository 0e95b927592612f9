"""A Docker engine, and the project's Compose stack on it: what the tests of this folder share."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.servers import free_port, wait_until

ROOT = Path(__file__).resolve().parents[2]
IMAGE_TAG = "test"
BUILD_LIMIT_S = 900
UP_LIMIT_S = 180


def require_engine() -> None:
    """Skip the test where no Docker engine with Compose answers; fail it in CI (CI=true), where one
    is promised."""
    reason = _engine_missing()
    if reason is not None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


def _engine_missing() -> str | None:
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"no Docker engine with Compose: {error}"
        if done.returncode != 0:
            return f"no Docker engine with Compose: {(done.stderr or done.stdout).strip()[-200:]}"
    return None


class ComposeStack:
    """The services of ``docker-compose.yml`` under a project name of their own, on a free port and
    a folder of their own."""

    scale: Mapping[str, int] = {"redis": 1, "gateway": 1, "worker": 2, "checkpointer": 2}

    def __init__(self, data: Path) -> None:
        self.data = data
        # Files must belong to the caller; root stands for the ordinary user 1000, since no service
        # runs as root.
        self.uid, self.gid = (os.getuid(), os.getgid()) if os.getuid() else (1000, 1000)
        if os.getuid() == 0:
            os.chown(data, self.uid, self.gid)
        self.port = free_port()
        self.project = f"nexrl-test-{os.getpid()}-{self.port}"
        self.url = f"http://127.0.0.1:{self.port}"
        self._env = {
            **os.environ,
            "COMPOSE_PROJECT_NAME": self.project,
            "COMPOSE_FILE": str(ROOT / "docker-compose.yml"),
            "NEXRL_DATA": str(data),
            "NEXRL_UID": str(self.uid),
            "NEXRL_GID": str(self.gid),
            "NEXRL_PORT": str(self.port),
            "NEXRL_TAG": IMAGE_TAG,
            "NEXRL_SLOTS": "2",
            "NEXRL_MODELS": "",
        }

    def compose(self, *arguments: str, timeout_s: float = 60.0) -> str:
        """Run ``docker compose``; its standard output. A failure fails the test with what it
        said."""
        done = subprocess.run(
            ["docker", "compose", *arguments],
            cwd=ROOT,
            env=self._env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if done.returncode != 0:
            pytest.fail(
                f"docker compose {' '.join(arguments)} ended with "
                f"{done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}"
            )
        return done.stdout

    def build(self) -> None:
        """Build the images; layers of an earlier build are used again."""
        self.compose("build", timeout_s=BUILD_LIMIT_S)

    def up(self) -> None:
        """Start every service with two workers and two checkpointers, and wait until all are
        healthy."""
        scales = [f"--scale={name}={count}" for name, count in self.scale.items() if count > 1]
        self.compose("up", "-d", "--no-build", *scales, timeout_s=UP_LIMIT_S)
        try:
            wait_until(self._healthy, UP_LIMIT_S, "health of every container", every_s=0.5)
        except BaseException:
            pytest.fail(f"not every container became healthy: {self.health()}\n{self.logs()}")

    def containers(self, service: str = "") -> list[dict[str, Any]]:
        """What the engine knows of the containers, stopped ones too; of one service if it is
        named."""
        wanted = [f"label=com.docker.compose.project={self.project}"]
        if service:
            wanted.append(f"label=com.docker.compose.service={service}")
        ids = self.listed("ps", "--all", *wanted)
        found: list[dict[str, Any]] = json.loads(docker("inspect", *ids)) if ids else []
        return found

    def health(self) -> dict[str, str]:
        """Container name -> "healthy", "starting", "unhealthy", or its state where it does not
        run."""
        return {
            each["Name"].lstrip("/"): each["State"].get("Health", {}).get("Status", "none")
            if each["State"]["Running"]
            else each["State"]["Status"]
            for each in self.containers()
        }

    def _healthy(self) -> bool:
        health = self.health()
        return len(health) == sum(self.scale.values()) and set(health.values()) == {"healthy"}

    def logs(self) -> str:
        """The last lines of every container."""
        return self.compose("logs", "--tail=40", "--no-color")

    def left(self) -> dict[str, list[str]]:
        """Ids of what the engine still holds for this project."""
        label = f"label=com.docker.compose.project={self.project}"
        return {
            "containers": self.listed("ps", "--all", label),
            "networks": self.listed("network ls", "", label),
            "volumes": self.listed("volume ls", "", label),
        }

    @staticmethod
    def listed(command: str, option: str, *filters: str) -> list[str]:
        """The ids that ``docker COMMAND -q`` lists under all ``filters``."""
        chosen = [part for one in filters for part in ("--filter", one)]
        return docker(*command.split(), "-q", *([option] if option else []), *chosen).split()


def docker(*arguments: str, timeout_s: float = 60.0) -> str:
    """Run ``docker``; its standard output. A failure fails the test."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=timeout_s)
    if done.returncode != 0:
        pytest.fail(
            f"docker {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-2000:]}"
        )
    return done.stdout
