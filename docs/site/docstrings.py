"""Shows the package's docstrings, which are written for ``help()``, as Markdown."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parent))

import formulas

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([\w.]+)`")
TABLE = re.compile(r"^( *)(=+)  =+\n(.*?)\n *=+  =+$", re.MULTILINE | re.DOTALL)


def to_markdown(text: str, find: Callable[[str], str] = str) -> str:
    """Returns a docstring with its roles and citations as links, its ``::`` blocks and tables as code.

    Args:
      text: the docstring.
      find: gives the dotted name of what a role calls by a short one.

    Example:
      >>> print(to_markdown("See :func:`~a.b.c`::"))
      See <autoref optional identifier="a.b.c"><code>c</code></autoref>:
    """

    def link(found: re.Match[str]) -> str:
        shown = found[1].rpartition(".")[2] if "~" in found[0] else found[1]
        return f'<autoref optional identifier="{find(found[1])}"><code>{shown}</code></autoref>'

    text = TABLE.sub(_list, text)
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    return formulas.linked(ROLE.sub(link, re.sub(r"::$", ":", text, flags=re.MULTILINE)))


def _list(found: re.Match[str]) -> str:
    """A table of names and texts as a list."""
    width, items = len(found[2]), []
    for line in found[3].splitlines():
        name, about = line[:width].strip(), line[width:].strip()
        items += [f"{found[1]}- {name}: {about}"] if name else [f"{found[1]}  {about}"]
    return "\n".join(items)


class Docstrings(griffe.Extension):
    """Rewrites every docstring when it has been read."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrites one."""
        if obj.docstring is None:
            return

        def find(name: str) -> str:
            scope, first = obj, name.partition(".")[0]
            while scope is not None:
                if first in scope.members:
                    return f"{scope.path}.{name}"
                scope = scope.parent
            return name

        obj.docstring.value = to_markdown(obj.docstring.value, find)
