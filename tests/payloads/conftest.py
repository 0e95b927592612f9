"""Both stores."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from nexrl_payloads import PayloadStore, open_store

from tests.helpers.payloads import url_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of the ``file://`` store."""
    return tmp_path / "payloads"


@pytest.fixture
def file_store(folder: Path) -> PayloadStore:
    """A store in a folder."""
    return open_store(url_of(folder))


@pytest.fixture
def redis_store(redis_url: str) -> PayloadStore:
    """A store in the session's Redis."""
    return open_store(redis_url)


@pytest.fixture(params=["file", "redis"])
def store(request: pytest.FixtureRequest) -> PayloadStore:
    """Each store in turn."""
    found: PayloadStore = request.getfixturevalue(f"{request.param}_store")
    return found


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 4 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if (
        os.getuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(mount)]).returncode
    ):
        pytest.skip(
            "only root may mount a small disk; test_file_size_limit covers the same refusal"
        )
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)
