"""Write docs/configuration.md from the configuration models; with --check, fail when the file is not current."""

from __future__ import annotations

import sys
import typing
from pathlib import Path
from typing import Any

from nexrl_contract.sections import ResourceConfig, Section, ServiceEntry
from pydantic.fields import FieldInfo

TARGET = Path(__file__).parents[1] / "docs" / "configuration.md"
HEAD = """# Configuration of a worker group

`initialize_worker(config_dict=...)` takes `{"actor": {...}, "resource": {...}}`; only `actor.model.path` is required.
An unknown key is refused with the nearest known one; `${...}` is refused by name. This page is generated from
`libs/contract/src/nexrl_contract/sections.py` by `scripts/configuration_docs.py`.

| key | type | default | meaning |
|---|---|---|---|
"""


def document() -> str:
    """The page."""
    rows, inert = _walk(ServiceEntry, "")
    tail = (
        "\n## Known, and without effect here\n\n"
        "Accepted so that existing recipes run; the answer lists those you sent under `ignored`.\n\n"
    )
    return HEAD + "".join(rows) + tail + ", ".join(f"`{name}`" for name in inert) + "\n"


def _walk(section: type[Section], prefix: str) -> tuple[list[str], list[str]]:
    rows: list[str] = []
    inert: list[str] = []
    for name, info in section.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            deeper = _walk(inner, f"{prefix}{name}.")
            rows += deeper[0]
            inert += deeper[1]
        elif info.json_schema_extra:
            inert += [f"{prefix}{name}"] if prefix or section is ResourceConfig else []
        else:
            rows.append(f"| `{prefix}{name}` | {_type(inner)} | {_default(info)} | {info.description or ''} |\n")
    return rows, inert


def _type(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    if typing.get_origin(annotation) is typing.Annotated:
        return _type(typing.get_args(annotation)[0])
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
        sys.exit(0 if TARGET.read_text() == document() else f"{TARGET.name} is not current: run make docs")
    TARGET.write_text(document())
