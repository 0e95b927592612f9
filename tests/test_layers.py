"""Who may import whom, what imports without torch, and how large a module may grow."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from nexrl_contract import names

ROOT = Path(__file__).resolve().parents[1]
SERVICES = {"nexrl_gateway", "nexrl_worker", "nexrl_checkpointer", "nexrl_stack"}
LIBRARIES = {
    "tensor_codec",
    "nexrl_contract",
    "nexrl_host",
    "nexrl_storage",
    "nexrl_ledger",
    "nexrl_payloads",
    "nexrl_client",
}

# What of our own each part may import; every third-party rule below it stands for itself.
MAY_IMPORT = {
    "tensor_codec": set(),
    "nexrl_contract": set(),
    "nexrl_host": set(),
    "nexrl_storage": {"nexrl_contract"},
    "nexrl_ledger": {"nexrl_contract"},
    "nexrl_payloads": {"nexrl_contract", "nexrl_storage", "tensor_codec"},
    "nexrl_client": {"nexrl_contract", "tensor_codec"},
    "nexrl_gateway": LIBRARIES - {"nexrl_client"},
    "nexrl_worker": LIBRARIES - {"nexrl_client"},
    "nexrl_checkpointer": {"nexrl_contract", "nexrl_host", "nexrl_ledger", "nexrl_storage"},
    "nexrl_stack": {"nexrl_contract", "nexrl_host", "nexrl_ledger", "nexrl_storage"},
}
NEVER = {
    "nexrl_contract": {"torch", "redis", "rq", "fastapi", "numpy"},
    "nexrl_ledger": {"torch", "fastapi"},
    "nexrl_payloads": {"rq", "fastapi"},
    "nexrl_client": {"redis", "rq", "fastapi"},
    "nexrl_gateway": {"torch", "transformers", "requests"},
    "nexrl_worker": {"fastapi", "uvicorn"},
    "nexrl_checkpointer": {"torch", "transformers", "fastapi"},
    "nexrl_stack": {"torch", "transformers", "fastapi", "rq"},
}
WITHOUT_TORCH = sorted({*MAY_IMPORT} - {"nexrl_worker"})
UNSAFE = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}

MODULE_LINES = 460
CLASS_LINES = 300


def part_folders() -> dict[str, Path]:
    """Import name -> its folder, found on disk."""
    return {
        init.parent.name: init.parent
        for kind in ("libs", "services")
        for init in ROOT.glob(f"{kind}/*/src/*/__init__.py")
    }


def modules(part: str) -> list[Path]:
    return sorted(part_folders()[part].rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of every absolute import in a file, lazy ones and string ones of
    importlib included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.split(".")[0]
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("import_module")
            and node.args
        ):
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value.split(".")[0]


def test_every_part_has_rules() -> None:
    """A new part must say what it may import."""
    assert set(part_folders()) == set(MAY_IMPORT) == SERVICES | LIBRARIES


@pytest.mark.parametrize("part", sorted(MAY_IMPORT))
def test_imports(part: str) -> None:
    """Services never import one another, the contract imports nothing heavy, nobody unpickles."""
    forbidden = (
        ((SERVICES | LIBRARIES) - {part} - MAY_IMPORT[part]) | NEVER.get(part, set()) | UNSAFE
    )
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {package}"
        for path in modules(part)
        for line, package in imports(path)
        if package in forbidden
    ]
    assert found == []


@pytest.mark.parametrize("part", sorted(MAY_IMPORT))
def test_declares_what_it_imports(part: str) -> None:
    """A part's pyproject.toml names every sibling it imports, and no other: an image installs only
    those."""
    project = part_folders()[part].parents[1] / "pyproject.toml"
    declared = {
        name for name in SERVICES | LIBRARIES if f'"{name.replace("_", "-")}' in project.read_text()
    }
    used = {package for path in modules(part) for _, package in imports(path)} & (
        SERVICES | LIBRARIES
    ) - {part}
    assert declared - {part} == used


@pytest.mark.parametrize("part", WITHOUT_TORCH)
def test_imports_without_torch(part: str) -> None:
    """Every module of the part can be imported in a fresh process, and torch is not loaded by
    it."""
    folder = part_folders()[part]
    names = [
        ".".join(path.relative_to(folder.parent).with_suffix("").parts) for path in modules(part)
    ]
    wanted = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    program = (
        f"import importlib, sys\nfor name in {wanted!r}: "
        "importlib.import_module(name)\nsys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr or "torch was imported"


def test_modules_and_classes_stay_small() -> None:
    """A module is read in one sitting, and a class does one thing: neither grows without end."""
    too_large: list[str] = []
    for part in MAY_IMPORT:
        for path in modules(part):
            text = path.read_text()
            if (size := len(text.splitlines())) > MODULE_LINES:
                too_large.append(f"{path.relative_to(ROOT)}: {size} lines")
            for node in ast.walk(ast.parse(text)):
                if (
                    isinstance(node, ast.ClassDef)
                    and (size := node.end_lineno - node.lineno + 1) > CLASS_LINES
                ):
                    too_large.append(
                        f"{path.relative_to(ROOT)}: class {node.name} has {size} lines"
                    )
    assert too_large == []


@pytest.mark.parametrize("part", sorted(SERVICES))
def test_nobody_but_the_ledger_talks_to_its_redis(part: str) -> None:
    """What a service wants of the records is a method with a name; no service knows a key."""
    keys = "|".join(
        name
        for name in vars(names)
        if name.lower().endswith(("_key", "_channel")) and not name.startswith("valid")
    )
    for path in modules(part):
        known = rf"ledger\.client|nexrl:\w|names\.(?:{keys})\b|import .*\b(?:{keys})\b"
        found = re.findall(known, path.read_text())
        assert found == [], path
