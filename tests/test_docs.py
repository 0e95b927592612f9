"""Links between the pages, and the codes that they name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from nexrl_contract.errors import ERRORS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")})


def anchors(page: Path) -> set[str]:
    """What may stand behind the # of a link to the page."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    """To a file of this tree, and where it names a heading, to that."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_messages_of_the_troubleshooting_page_begin_with_codes_of_the_service() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    shown = re.findall(r"^([A-Z]+(?:_[A-Z]+)+): ", page, re.MULTILINE)
    assert len(shown) > 10
    assert {*shown} <= {*ERRORS}
