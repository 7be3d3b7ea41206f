"""What ``celo-nnx list`` shows: parts, variants, task presets, data sets."""

from __future__ import annotations

import ast
import pkgutil
from collections.abc import Mapping
from pathlib import Path

from celo_nnx.errors import unknown

KINDS = ("parts", "variants", "tasks", "data")


def lines(what: str) -> str:
    """Returns the names of one kind with a line about each.

    Args:
      what: one of :data:`KINDS`.

    Raises:
      UserError: another word.

    Example:
      >>> lines("variants").splitlines()[0]
      'variants'
    """
    if what == "parts":
        from celo_nnx.build import list_parts

        return "\n".join(_table(kind, names) for kind, names in list_parts().items())
    if what == "data":
        from celo_nnx.tasks import listing

        return _table("data sets", listing())
    if what in ("variants", "tasks"):
        return _table(what, {name: about for name, (kind, about) in presets().items() if kind == what})
    raise unknown("list", what, KINDS)


def presets() -> dict[str, tuple[str, str]]:
    """Returns ``{name: (kind, first line of its docstring)}`` of the files in ``celo_nnx.experiments``.

    A file whose ``get_config`` takes an argument, the task preset's name, is a variant; one whose
    ``get_config`` takes none is a task preset. The files are read, not run.
    """
    import celo_nnx.experiments as folder

    found = {}
    for module in pkgutil.iter_modules(folder.__path__):
        tree = ast.parse((Path(folder.__path__[0]) / f"{module.name}.py").read_text(encoding="utf-8"))
        functions = [
            node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "get_config"
        ]
        if functions:
            kind = "variants" if functions[0].args.args else "tasks"
            found[module.name] = (kind, (ast.get_docstring(tree) or "").split("\n")[0])
    return found


def _table(title: str, names: Mapping[str, str]) -> str:
    width = max((len(name) for name in names), default=0)
    return "\n".join([title, *(f"  {name:<{width}}  {about}".rstrip() for name, about in names.items())])
