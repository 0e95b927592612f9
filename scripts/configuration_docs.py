"""Write docs/configuration.md from the configuration models; with --check, fail when the file is
not current."""

from __future__ import annotations

import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nexrl_contract.sections import Section, ServiceEntry, is_inert, reason_against, section_of
from pydantic.fields import FieldInfo

TARGET = Path(__file__).parents[1] / "docs" / "configuration.md"
HEAD = """# Configuration of a worker group

`initialize_worker(config_dict=...)` takes `{"actor": {...}, "resource": {...}}`; only
`actor.model.path` is required. An unknown key is refused with the nearest known one; `${...}` is
refused by name. A key or section without a value (YAML null) is as if it were not there;
`grad_clip: null` alone says something of its own. This page is generated from
`libs/contract/src/nexrl_contract/sections.py` by `scripts/configuration_docs.py`.

| key | type | default | meaning |
|---|---|---|---|
"""


INERT = """
## Known, and without effect here

Accepted so that existing recipes run; the answer lists those you sent under `ignored`.

"""
NOT_OFFERED = """
## Known, and not offered

`true` is refused, because it would change what the group does; `false` changes nothing and is not
listed anywhere.

"""


def document() -> str:
    """The page."""
    rows: list[str] = []
    inert: list[str] = []
    not_offered: list[str] = []
    for key, info in _keys(ServiceEntry, ""):
        if is_inert(info):
            inert += [f"`{key}`"] if "." in key else []  # the others say which group is meant
        elif reason_against(info):
            not_offered.append(f"`{key}`")
        else:
            meaning = (info.description or "").replace("|", r"\|")
            rows.append(f"| `{key}` | {_type(info.annotation)} | {_default(info)} | {meaning} |\n")
    return HEAD + "".join(rows) + INERT + _filled(inert) + NOT_OFFERED + _filled(not_offered)


def _filled(keys: list[str]) -> str:
    return textwrap.fill(", ".join(keys), 100, break_on_hyphens=False) + "\n"


def _keys(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    """Every key by its dotted name. A section has no row, unless it may be null: then its keys
    follow it."""
    for name, info in section.model_fields.items():
        inner = section_of(info)
        if inner is None or info.annotation is not inner:
            yield f"{prefix}{name}", info
        if inner is not None:
            yield from _keys(inner, f"{prefix}{name}.")


def _type(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    if typing.get_origin(annotation) is typing.Annotated:
        return _type(typing.get_args(annotation)[0])
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "mapping"
    inner = [part for part in typing.get_args(annotation) if part is not type(None)]
    if typing.get_origin(annotation) is tuple:
        return "two numbers"
    if inner:
        return f"{_type(inner[0])} or null"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true, false"}.get(
        annotation.__name__, annotation.__name__
    )


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    if info.default is None:
        return "null"
    return f"`{str(info.default).lower() if isinstance(info.default, bool) else info.default}`"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(
            0
            if TARGET.read_text() == document()
            else f"{TARGET.name} is not current: run make docs"
        )
    TARGET.write_text(document())
