"""The site: no warning when it is built, every public name in it, nothing fetched from elsewhere."""

from __future__ import annotations

import csv
import doctest
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import docs_pages
import pytest

ROOT = docs_pages.ROOT


def module(name: str) -> Any:
    """Imports a module of ``docs/site``, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "site" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


reference = module("reference")


def names() -> set[str]:
    """Returns the dotted name of everything that a module defines for others."""
    return {
        f"{name}.{public}"
        for name, path in reference.modules().items()
        if name != "celo_nnx"
        for public in reference.public_names(path)
        if public not in ("Array", "PyTree")
    }


def test_examples_of_the_sites_own_code() -> None:
    assert doctest.testmod(reference).failed == doctest.testmod(module("notebooks")).failed == 0
    if importlib.util.find_spec("griffe"):
        assert doctest.testmod(module("docstrings")).failed == 0


def test_every_module_has_its_place_on_one_page() -> None:
    shown = re.findall(r"^::: (\S+)$", "\n".join(reference.pages().values()), re.MULTILINE)
    assert len(shown) == len(set(shown))
    assert {name.rpartition(".")[0] for name in names()} <= set(shown) <= set(reference.modules())


def test_exported_names_are_defined_in_shown_modules() -> None:
    import celo_nnx

    for name in celo_nnx.__all__:
        value = getattr(celo_nnx, name)
        assert f"{value.__module__}.{value.__name__}" in names(), name


def test_tables_of_names_can_be_made() -> None:
    tables = module("tables")
    made = tables.pages()
    assert set(made) == set(tables.PAGES)
    assert "celo_nnx.drop_in.celo2" in made["index.md"] and "## celo-nnx grid run" not in made["index.md"]
    assert "| `newton_schulz` |" in made["parts.md"] and "| `celo17` |" in made["experiments.md"]
    for command in ("train", "grid run", "bench meta", "import"):
        assert f"# celo-nnx {command}\n" in made["commands.md"]


def test_a_reports_table_says_what_the_file_says(tmp_path: Path) -> None:
    head = "optimizer,score_iqm,score_iqm_low,score_iqm_high,speedup_iqm,speedup_lower_bounds"
    rows = ["celo2_base,1.5,1,2,2.25,3", "adam,1,1,1,0.9,0"]
    (tmp_path / "a.csv").write_text("\n".join([head, *rows]) + "\n")
    columns = ["optimizer", "score_iqm=final_loss_score", "speedup_iqm=speedup"]
    assert module("hooks").csv_table(tmp_path / "a.csv", columns).splitlines() == [
        "| optimizer | final loss score | speedup |",
        "| --- | --- | --- |",
        "| celo2_base | 1.50 (1 to 2) | at least 2.25 |",
        "| adam | 1 | 0.90 |",
    ]


def test_every_candidate_of_the_selection_is_explained() -> None:
    with (ROOT / "experiments/weights/celo2/selection.csv").open() as file:
        labels = {row["optimizer"] for row in csv.DictReader(file)} - {"adam", "muon"}
    below = (ROOT / "docs/results.md").read_text().partition("selection.csv optimizer")[2]
    legend = below.partition("\n## ")[0]
    assert labels <= set(re.findall(r"`([^`]+)`", legend))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; skips where what builds it is not installed (``pip install -e '.[docs]'``)."""
    for needed in ("mkdocs", "material", "mkdocstrings_handlers"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    program = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-4000:]
    return folder


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    text = "\n".join(path.read_text() for path in (site / "reference").glob("*.html"))
    assert names() - set(re.findall(r'id="(celo_nnx[\w.]*)"', text)) == set()


def test_links_of_the_site_resolve(site: Path) -> None:
    pages = {path: path.read_text() for path in site.rglob("*.html") if "experiments" not in path.parts}
    ids = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in pages.items()}
    for path, text in pages.items():
        if path.name == "404.html":
            continue
        for link in re.findall(r'(?:href|src)="([^":]+)"', text):
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.exists(), f"{path.relative_to(site)}: {link}"
            assert not anchor or target not in ids or anchor in ids[target] or anchor.startswith("__"), link


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text()
        fetched = re.findall(r'<(?:script|img|iframe|link)\b[^>]*(?:src|href)="(https?://[^"]+)"', text)
        assert fetched == [], path.relative_to(site)


def test_tables_come_from_the_reports(site: Path) -> None:
    text = (site / "results.html").read_text()
    assert "<!-- table" not in text and text.count("<table>") == len(
        re.findall("<!-- table:", (ROOT / "docs/results.md").read_text())
    )
