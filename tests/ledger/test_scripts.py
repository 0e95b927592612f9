"""The Lua scripts: Redis takes each, and the linter finds what Redis would find too late."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from nexrl_ledger import connect
from nexrl_ledger.scripts import SCRIPTS

LINTER = Path(__file__).parents[2] / "scripts" / "lua_lint.py"


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_redis_compiles_the_script(name: str, redis_url: str) -> None:
    client = connect(redis_url)

    assert client.script_load(SCRIPTS[name])
    client.close()


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        ("local job = unpack(KEYS)\nreturn jb .. job", "jb is neither local nor one of Redis'"),
        ("local job, group = unpack(KEYS)\nreturn job", "nobody reads the local group"),
        ("-- args: now\nreturn args.then_", "the comment 'args:' and the script differ in now"),
        ("return redis.call('GET', 'nexrl:jobs')", "the key 'nexrl:jobs' is spelled out"),
        (f"return '{'x' * 100}'", "109 columns, more than 100"),
        ("return", None),
    ],
)
def test_the_linter_names_the_fault(script: str, fault: str | None, tmp_path: Path) -> None:
    (tmp_path / "shared.lua").write_text("local args = cjson.decode(ARGV[1])\n")
    (tmp_path / "script.lua").write_text(script)
    run = [sys.executable, str(LINTER), str(tmp_path)]

    linted = subprocess.run(run, capture_output=True, text=True)

    assert linted.returncode == (fault is not None)
    assert (fault or "all checks passed") in linted.stdout
