"""docs/configuration.md says of every key what really happens to it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nexrl_contract.config import GroupConfig, parse_config
from nexrl_contract.errors import ServiceError
from nexrl_contract.sections import Section, ServiceEntry, section_of

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "configuration_docs.py"
PAGE = (ROOT / "docs" / "configuration.md").read_text()
TABLE, INERT, NOT_OFFERED = PAGE.split("\n## ")
ROWS = {
    line.split("`")[1]: re.split(r"(?<!\\)\|", line)[2:-1]
    for line in TABLE.splitlines()
    if line.startswith("| `")
}
OF_THE_ENTRY = {"identifier", "role", "backend", "url"}
"""They say which group an entry is about, and are no settings of it."""


def names(text: str) -> list[str]:
    return re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", text)


def keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Every key that holds a value itself."""
    for name, info in section.model_fields.items():
        inner = section_of(info)
        if inner is None:
            yield f"{prefix}{name}"
        else:
            yield from keys(inner, f"{prefix}{name}.")


def parse(key: str, value: Any) -> GroupConfig:
    for name in reversed(key.split(".")):
        value = {name: value}
    actor = value.setdefault("actor", {})
    actor["model"] = {"path": "/models/tiny", **actor.get("model", {})}
    return parse_config(value)


def test_every_key_is_documented_once() -> None:
    """With a type, a default and a meaning, or as one that does nothing or is not offered."""
    known = [*ROWS, *names(INERT), *names(NOT_OFFERED)]

    assert sorted({*known} - {"actor.rollout_correction"}) == sorted(
        {*keys(ServiceEntry)} - OF_THE_ENTRY
    )
    assert len(known) == len(set(known))
    for key, cells in ROWS.items():
        assert len(cells) == 3, key
        assert all(cell.strip() for cell in cells), key
        assert not re.search(r"[a-z][A-Z]", cells[0]), (
            f"{key} has the type {cells[0]}"
        )  # a class of ours


@pytest.mark.parametrize("key", names(INERT))
def test_a_key_without_effect_is_accepted_and_listed(key: str) -> None:
    assert key in parse(key, True).ignored


@pytest.mark.parametrize("key", names(NOT_OFFERED))
def test_a_key_that_is_not_offered_is_refused_when_true(key: str) -> None:
    assert key not in parse(key, False).ignored
    with pytest.raises(ServiceError, match=key):
        parse(key, True)


def test_a_page_that_is_not_current_names_the_command_that_writes_it(tmp_path: Path) -> None:
    """A target of the Makefile, which runs the same program; its page is the one that stands
    here."""
    for folder in ("scripts", "docs"):
        (tmp_path / folder).mkdir()
    script = shutil.copy(SCRIPT, tmp_path / "scripts")
    page = tmp_path / "docs" / "configuration.md"
    page.write_text("old")
    checked = subprocess.run(
        [sys.executable, script, "--check"], capture_output=True, text=True, check=False
    )
    target = re.search(r"make ([a-z-]+)", checked.stderr)
    assert checked.returncode == 1
    assert target
    assert re.search(
        rf"^{target[1]}:.*\n\t.*scripts/{SCRIPT.name}$",
        (ROOT / "Makefile").read_text(),
        re.MULTILINE,
    )
    subprocess.run([sys.executable, script], check=True)
    assert page.read_text() == PAGE
