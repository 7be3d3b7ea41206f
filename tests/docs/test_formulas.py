"""What docstrings and comments cite of the formulas stands on their pages."""

from __future__ import annotations

import doctest
import importlib.util
import re
import sys
from typing import Any

import docs_pages
import pytest

ROOT = docs_pages.ROOT


def module() -> Any:
    """Imports ``docs/site/formulas.py``, which is in no package."""
    spec = importlib.util.spec_from_file_location("formulas", ROOT / "docs" / "site" / "formulas.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules["formulas"] = made
    spec.loader.exec_module(made)
    return made


formulas = module()
SOURCES = [path for top in ("celo_nnx", "components", "experiments") for path in (ROOT / top).rglob("*.py")]
TEXTS = {path: re.sub(r"\s+(# )?", " ", path.read_text()) for path in (*SOURCES, ROOT / "README.md")}


def test_examples() -> None:
    assert doctest.testmod(formulas).failed == 0


def test_everything_cited_is_there() -> None:
    known = {page: formulas.anchors(page) for page in formulas.PAGES}
    cited = {(page, item): path for path, text in TEXTS.items() for page, item in formulas.cited(text)}
    assert len(cited) > 100 and ("OPTIMIZERS", "14.2") in cited and ("META_TRAINING", "0") in cited
    missing = {item: path for item, path in cited.items() if item[1] not in known[item[0]]}
    assert not missing


def test_a_section_is_cited_with_its_page() -> None:
    for path, text in TEXTS.items():
        for before in re.findall(r"(\w+)\W+sections? \d", text):
            paper = before.isdigit()  # its year
            assert paper or before in formulas.PAGES, f"{path.relative_to(ROOT)}: {before} section ..."


@pytest.mark.parametrize("page", ["optimizers", "meta-training"])
def test_every_equation_has_its_anchor(page: str) -> None:
    text = (ROOT / "docs" / "formulas" / f"{page}.md").read_text()
    labels = re.findall(r"^\((\w+)\)  ", text, re.MULTILINE)
    assert labels == re.findall(r'<a id="(\w+)"></a>', text) and len(set(labels)) == len(labels)
