"""Citations of the pages of formulas: "OPTIMIZERS 1.5", "META_TRAINING section 4", "(A1)", as links."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "formulas"
PAGES = {"OPTIMIZERS": "optimizers", "META_TRAINING": "meta-training"}
LABEL = r"\b(?:CA|[A-HLMNRSTV])\d\b"
SECTION = r"\b\d+(?:\.\d+)?\b"
BETWEEN = r"(?:,\s+and|,|;|\s+and|\s+to)\s+"
# A page's name with a list of sections and equations; a list of equations alone is of the optimizers.
CITATION = re.compile(
    rf"\b(?P<page>{'|'.join(PAGES)})\s+(?P<word>sections?\s+|\()?"
    rf"(?P<items>(?:{LABEL}|{SECTION})(?:{BETWEEN}(?:{LABEL}|{SECTION}))*)"
    rf"|(?P<labels>{LABEL}(?:{BETWEEN}{LABEL})*)"
)
ITEM = re.compile(f"{LABEL}|{SECTION}")
CODE = re.compile(r"(``.*?``|`[^`\n]*`)", re.DOTALL)


@functools.cache
def anchors(page: str) -> dict[str, str]:
    """Returns the anchor of every section and equation of a page, by what it is cited by.

    Example:
      >>> anchors("OPTIMIZERS")["1.5"], anchors("OPTIMIZERS")["A1"], anchors("META_TRAINING")["4"]
      ('15-accumulators', 'A1', '4-the-pes-gradient')
    """
    text = (FOLDER / f"{PAGES[page]}.md").read_text()
    found = {name: name for name in re.findall(r'<a id="(\w+)"></a>', text)}
    for number, title in re.findall(r"^##+ ([\d.]+?)\.? (.*)$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", f"{number} {title}".lower())
        found[number] = re.sub(r"[- ]+", "-", slug)
    return found


def cited(text: str) -> Iterator[tuple[str, str]]:
    """Yields (page, section or equation) of every citation, those between the ends of a range too.

    Example:
      >>> list(cited("OPTIMIZERS 1.9 to 1.11, and E7"))
      [('OPTIMIZERS', '1.9'), ('OPTIMIZERS', '1.10'), ('OPTIMIZERS', '1.11'), ('OPTIMIZERS', 'E7')]
    """
    for found in CITATION.finditer(text):
        page, items, last = found["page"] or "OPTIMIZERS", found["items"] or found["labels"], ""
        for item in ITEM.finditer(items):
            if last and items[: item.start()].endswith("to "):
                head, end = re.fullmatch(r"(.*?)(\d+)", item[0]).groups()
                first = int(re.search(r"\d+$", last)[0]) + 1
                yield from ((page, f"{head}{n}") for n in range(first, int(end)))
            yield page, item[0]
            last = item[0]


def linked(text: str) -> str:
    """Returns Markdown of the reference with its citations as links; code stays as it is.

    Example:
      >>> linked("(E7)")
      '(<a href="../formulas/optimizers.html#E7">E7</a>)'
    """
    parts = CODE.split(text)
    return "".join(part if i % 2 else CITATION.sub(_links, part) for i, part in enumerate(parts))


def _links(found: re.Match[str]) -> str:
    page, first = found["page"] or "OPTIMIZERS", True
    known = anchors(page)

    def link(item: re.Match[str]) -> str:
        nonlocal first
        shown = f"{found['page']} {found['word'] or ''}{item[0]}" if first and found["page"] else item[0]
        first = False
        if item[0] not in known:
            return shown
        return f'<a href="../formulas/{PAGES[page]}.html#{known[item[0]]}">{shown}</a>'

    return ITEM.sub(link, found["items"] or found["labels"])
