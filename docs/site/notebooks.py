"""Notebooks as pages: their cells in order, text as it is, code as code. A test runs them, not this."""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"


def pages() -> dict[str, str]:
    """Returns the Markdown of every notebook in ``docs/notebooks`` by the name of its page."""
    found = sorted(FOLDER.glob("*.ipynb"))
    return {f"notebooks/{path.stem}.md": page(json.loads(path.read_text()), path.name) for path in found}


def page(notebook: dict, name: str) -> str:
    """Returns one as Markdown.

    Example:
      >>> text = {"cell_type": "markdown", "source": ["# Title"]}
      >>> page({"cells": [text, {"cell_type": "code", "source": ["x = 1"]}]}, "a.ipynb").splitlines()[0]
      '# Title'
    """
    cells = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        cells.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    cells.insert(1, f"[{name}]({name}) is this page as a notebook: run it to see what it draws.")
    return "\n\n".join(cells) + "\n"
