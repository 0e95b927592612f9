"""Look through the ledger's Lua scripts, or those of another folder; exits 1 after naming file,
line and fault of each finding.

A fault is a global that Redis does not have, a local that nobody reads, an argument that the
comment above the script does not name (or names for nothing), a key that is spelled out instead of
passed in, a line of more than 100 columns.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from luaparser import ast
from luaparser.astnodes import (
    Forin,
    Fornum,
    Function,
    Index,
    IndexNotation,
    LocalAssign,
    LocalFunction,
    Name,
    String,
)

FOLDER = Path(__file__).parents[1] / "libs" / "ledger" / "src" / "nexrl_ledger" / "lua"
GLOBALS = {"ARGV", "KEYS", "cjson", "ipairs", "math", "redis", "tonumber", "unpack"}
COLUMNS = 100


def findings(text: str, shared: frozenset[str] = frozenset()) -> Iterator[tuple[int, str]]:
    """Line and fault of each finding in a script; ``shared`` names what stands before it."""
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > COLUMNS:
            yield number, f"{len(line)} columns, more than {COLUMNS}"
    nodes = list(ast.walk(ast.parse(text)))
    fields = {id(n.idx): n for n in nodes if isinstance(n, Index) and _is_dot(n)}
    declared = {id(name): name for node in nodes for name in _declared(node)}
    known = {name.id for name in declared.values()} | shared | GLOBALS
    read = [n for n in nodes if isinstance(n, Name) and id(n) not in declared | fields]
    for name in read:
        if name.id not in known:
            yield name.line or 0, f"{name.id} is neither local nor one of Redis' globals"
    unread = {name.id for name in declared.values()} - {name.id for name in read} - {"_"}
    if shared:
        yield from ((0, f"nobody reads the local {name}") for name in sorted(unread))
        yield from _arguments(text, fields.values())
    for node in nodes:
        if isinstance(node, String) and ":" in _text(node):
            yield node.line or 0, f"the key {_text(node)!r} is spelled out; pass it in"


def locals_of(text: str) -> frozenset[str]:
    """Names that a script declares at its top."""
    body = ast.parse(text).body.body
    return frozenset(name.id for node in body for name in _declared(node))


def _declared(node: object) -> list[Name]:
    if isinstance(node, LocalAssign | Forin):
        return [name for name in node.targets if isinstance(name, Name)]
    if isinstance(node, Fornum):
        return [node.target]
    if isinstance(node, LocalFunction):
        return [node.name, *node.args]
    return list(node.args) if isinstance(node, Function) else []


def _arguments(text: str, fields: object) -> Iterator[tuple[int, str]]:
    """The comment that begins with "args:" names each argument, outside of brackets."""
    head = re.search(r"^-- args: (.*(?:\n-- .*)*)", text, re.MULTILINE)
    listed = re.sub(r"\([^)]*\)|--|\s", "", head[1].replace("\n", " ") if head else "").split(",")
    used = {
        node.idx.id
        for node in fields  # type: ignore[attr-defined]
        if isinstance(node.value, Name) and node.value.id == "args"
    }
    for name in sorted(({*listed} ^ used) - {""}):
        yield 0, f"the comment 'args:' and the script differ in {name}"


def _is_dot(node: Index) -> bool:
    return node.notation == IndexNotation.DOT


def _text(node: String) -> str:
    return node.s.decode() if isinstance(node.s, bytes) else str(node.s)


def main() -> None:
    """Entry point."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    files = {path.name: path.read_text() for path in sorted(folder.glob("*.lua"))}
    shared = locals_of(files["shared.lua"])
    found = [
        f"{folder / name}:{line}: {fault}"
        for name, text in files.items()
        for line, fault in findings(text, frozenset() if name == "shared.lua" else shared)
    ]
    print("\n".join(found) or f"{len(files)} Lua scripts: all checks passed!")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
