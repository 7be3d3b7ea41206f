"""What the documentation shows runs as it stands there: every block of code of every page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import docs_pages
import pytest

from celo_nnx.config import load

PAGES = docs_pages.pages()
WITH_CODE = [name for name, path in PAGES.items() if docs_pages.blocks(path)]


def work_through(page: str, folder: Path, how: str) -> None:
    """Runs a page in a process of its own, as a user of this checkout."""
    environment = os.environ | {"PYTHONPATH": str(docs_pages.ROOT), "PYTHONWARNINGS": "default"}
    program = [sys.executable, docs_pages.__file__, page, str(folder), how]
    done = subprocess.run(program, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, f"{page}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("page", WITH_CODE)
def test_its_blocks_run(page: str, tmp_path: Path) -> None:
    work_through(page, tmp_path, "short")


@pytest.mark.drill
@pytest.mark.parametrize("page", [p for p in WITH_CODE if any(b.how for b in docs_pages.blocks(PAGES[p]))])
def test_its_blocks_run_in_full(page: str, tmp_path: Path) -> None:
    work_through(page, tmp_path, "full")


def test_blocks_are_found() -> None:
    fences = {
        name: len(re.findall(r"^ *```", path.read_text(), re.MULTILINE)) for name, path in PAGES.items()
    }
    assert {name: 2 * len(docs_pages.blocks(path)) for name, path in PAGES.items()} == fences
    shown = [line for path in PAGES.values() for b in docs_pages.blocks(path) for line in b.text.splitlines()]
    assert sum(line.startswith("celo-nnx") for line in shown) > 30


def test_comments_on_tests_stand_before_blocks() -> None:
    for name, path in PAGES.items():
        written = path.read_text().count("<!-- test:")
        assert written == sum(block.how != "" for block in docs_pages.blocks(path)), name


OVERRIDE = re.compile(r"`((?:meta|tasks|run|optimizer)\.[\w.]+=[^`\s]+)`")
OVERRIDES = {found for path in PAGES.values() for found in OVERRIDE.findall(path.read_text())}


@pytest.mark.parametrize("override", sorted(OVERRIDES))
def test_overrides_are_understood(override: str) -> None:
    load("celo2:fast_digits", [override])
