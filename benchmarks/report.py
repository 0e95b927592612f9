"""Findings for people: tables on the terminal, and a page for the repository."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import rich
from rich.table import Table as RichTable

from benchmarks import machine
from benchmarks.results import Findings

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"
_HEADINGS = ("what", "measured", "spread", "target", "verdict")
_STYLES = {"met": "green", "missed": "yellow", "failed": "red"}


def announce(part: str) -> None:
    """Say what is being measured."""
    rich.print(f"[dim]measuring: {part}[/dim]")


def show(found: Findings) -> None:
    """Print one part's tables."""
    table = _table(found.title, _HEADINGS)
    for measure in found.measures:
        *cells, verdict = measure.cells()
        table.add_row(*cells, f"[{_STYLES[verdict]}]{verdict}[/]")
    rich.print(table)
    for detail in found.tables:
        table = _table(detail.title, detail.columns)
        for row in detail.rows:
            table.add_row(*row)
        rich.print(table)


def keep(described: Sequence[tuple[str, str]], findings: Sequence[Findings]) -> None:
    """Write the page of a complete run; a second run of the day replaces it."""
    lines = [
        f"# Benchmarks of {time.strftime('%Y-%m-%d')}, {machine.kind()}",
        "",
        (
            "Made by `make bench`. A target is *missed* where the median falls short of it and "
            "*failed*, which fails the"
        ),
        "run, where it does so by more than a third.",
        "",
        *_rows(("machine", ""), described),
    ]
    for found in findings:
        lines += ["", f"## {found.title}", "", found.method, ""]
        lines += _rows(_HEADINGS, [measure.cells() for measure in found.measures])
        for detail in found.tables:
            lines += ["", f"{detail.title}:", "", *_rows(detail.columns, detail.rows)]
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{time.strftime('%Y-%m-%d')}-{machine.kind()}.md"
    path.write_text("\n".join(lines) + "\n")
    rich.print(
        f"kept in {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}"
    )


def _table(title: str, headings: Iterable[str]) -> RichTable:
    table = RichTable(title=title, title_justify="left")
    for position, heading in enumerate(headings):
        table.add_column(heading, justify="left" if position == 0 else "right")
    return table


def _rows(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *rows]
    return ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines]
