"""What MkDocs does beyond the pages: the reference, files of the repository, tables of reports."""

from __future__ import annotations

import csv
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import notebooks
import reference
import tables

ROOT = reference.ROOT
# Files of the repository that are pages or are shown on pages, at the same place in the site.
SHOWN = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "THIRD_PARTY_NOTICES.md", "LICENSE", "experiments")
SUFFIXES = {".md", ".svg", ".csv", ".html", ""}
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")
TABLE = re.compile(r"<!-- table: (\S+) (.*?) -->")
SPEEDUPS = ("speedup_iqm", "speedup_median", "speedup_mean")


def shown() -> dict[str, Path]:
    """Returns the files of the repository that are part of the site, by their path from its root."""
    found = {}
    for name in SHOWN:
        top = ROOT / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and path.suffix in SUFFIXES and "__pycache__" not in path.parts:
                found[path.relative_to(ROOT).as_posix()] = path
    return found


def on_config(config: Any) -> Any:
    """Puts pages that are made here, or came after the others, into the navigation."""
    for section in config["nav"]:
        if "Reference" in section:
            section["Reference"] += [f"reference/{name}" for name in (*tables.PAGES, *reference.pages())]
        if "How to" in section:  # pages that came after the others
            known = set(section["How to"])
            more = sorted(
                p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs/how-to").glob("*.md")
            )
            section["How to"] += [page for page in more if page not in known]
    if made := list(notebooks.pages()):
        config["nav"].insert(3, {"Notebooks": made})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages and the repository's files."""
    from mkdocs.structure.files import File  # here, so that tests read tables where MkDocs is not installed

    for name, text in (tables.pages() | reference.pages()).items():
        files.append(File.generated(config, f"reference/{name}", content=text))
    for name, text in notebooks.pages().items():
        files.append(File.generated(config, name, content=text))
    for name, path in shown().items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Makes links between files of the repository links between pages, and fills tables in."""
    uri = page.file.src_uri
    here = posixpath.dirname(uri if uri in shown() or uri.startswith("reference/") else f"docs/{uri}")
    base = posixpath.dirname(uri)

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, found[1]))
        if target == "README.md":
            target = "index.md"
        elif target.startswith("docs/"):
            target = target.removeprefix("docs/")
        elif target not in shown():
            return found[0]
        return posixpath.relpath(target, base or ".") + (found[2] or "")

    def table(found: re.Match[str]) -> str:
        return csv_table(ROOT / found[1], found[2].split())

    return LINK.sub(link, TABLE.sub(table, markdown))


def csv_table(path: Path, columns: list[str]) -> str:
    """Returns columns of a report's CSV file as a Markdown table.

    Args:
      path: the file.
      columns: each ``NAME`` or ``NAME=TITLE`` (``_`` for a space in the heading); where the file has
        ``NAME_low`` and ``NAME_high`` the interval is shown, and a speedup over runs that the file counts
        as lower bounds is "at least" that.
    """
    with path.open() as file:
        rows = list(csv.DictReader(file))
    names, titles = zip(*((c.partition("=")[0], c.partition("=")[2] or c) for c in columns), strict=True)
    lines = [[title.replace("_", " ") for title in titles], ["---"] * len(names)]
    lines += [[_cell(row, name) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: dict[str, str], name: str) -> str:
    text = _number(row[name])
    if name.startswith(SPEEDUPS) and float(row.get("speedup_lower_bounds") or 0) > 0:
        text = f"at least {text}"
    for low, high in ((f"{name}_low", f"{name}_high"), ("low", "high")):
        if row.get(low) and (low != "low" or name == "effect") and row[low] != row[high]:
            return f"{text} ({_number(row[low])} to {_number(row[high])})"
    return text


def _number(text: str) -> str:
    try:
        value = float(text)
    except ValueError:
        return text
    return str(int(value)) if value == int(value) else f"{value:.2f}"
