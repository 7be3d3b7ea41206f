"""Links of the documentation lead somewhere, as files of the repository and as names of the package."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import docs_pages
import pytest

ROOT = docs_pages.ROOT
MORE = {name: ROOT / name for name in ("CHANGELOG.md", "THIRD_PARTY_NOTICES.md")}
PAGES = docs_pages.pages() | MORE
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAME = re.compile(r"\]\[([\w.]+)\]")


def prose(path: Path) -> str:
    """Returns a page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """Returns the anchors of a page's headings, as the site and forges make them."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_resolve(page: str) -> None:
    path = PAGES[page]
    for link in LINK.findall(prose(path)):
        assert not link.startswith("http://"), f"{page}: {link}"
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        generated = docs_pages.ROOT / "docs/reference" in target.parents  # made when the site is built
        assert generated or (target.is_file() and target.is_relative_to(ROOT)), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"


@pytest.mark.parametrize("page", sorted(PAGES))
def test_linked_names_exist(page: str) -> None:
    for name in NAME.findall(prose(PAGES[page])):
        parts = name.split(".")
        for cut in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:cut]))
            except ModuleNotFoundError:
                continue
            for part in parts[cut:]:
                found = getattr(found, part)
            break
        else:
            pytest.fail(f"{page}: {name}")
