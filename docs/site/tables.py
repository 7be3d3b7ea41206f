"""Reference pages that are tables: public names, parts by kind, configs by their question, commands."""

from __future__ import annotations

import os
import re

import formulas
import reference

PAGES = ("index.md", "parts.md", "experiments.md", "commands.md")


def pages() -> dict[str, str]:
    """Returns the Markdown of each of :data:`PAGES`."""
    return dict(zip(PAGES, (_names(), _parts(), _experiments(), _commands()), strict=True))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _names() -> str:
    """The names of ``celo_nnx`` itself, then all pages."""
    import celo_nnx

    rows = []
    for name in celo_nnx.__all__:
        value = getattr(celo_nnx, name)
        about = _first_line(value)
        rows.append((f"[`celo_nnx.{name}`][{value.__module__}.{value.__name__}]", about))
    by_page = [
        (f"[{text.splitlines()[0][2:]}]({name})", _modules(text)) for name, text in reference.pages().items()
    ]
    return "\n".join(
        [
            "# All names\n",
            "Every public name, from its docstring. `import celo_nnx` gives:\n",
            _table(("name", ""), rows),
            "[Parts](parts.md), [configs](experiments.md) and [commands](commands.md) are tables of what a "
            "config or the command line can name. The modules:\n",
            _table(("page", "modules"), by_page),
        ]
    )


def _first_line(value: object) -> str:
    return formulas.linked(re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", (value.__doc__ or "").split("\n")[0]))


def _modules(text: str) -> str:
    names = [line[4:] for line in text.splitlines() if line.startswith("::: ")]
    return ", ".join(f"[`{name.removeprefix('celo_nnx.')}`][{name}]" for name in names)


def _link(part: type) -> str:
    return f"[`{part.__name__}`][{part.__module__}.{part.__qualname__}]"


def _rows(table: dict[str, type]) -> list[tuple[str, ...]]:
    return [(f"`{name}`", _link(part), _first_line(part)) for name, part in table.items()]


def _parts() -> str:
    """The tables in which ``kind=`` is looked up."""
    from celo_nnx.build import TABLES
    from celo_nnx.meta.augmentations import AUGMENTATIONS
    from celo_nnx.meta.estimators import ESTIMATORS

    made = [
        "# Parts by name\n",
        "What a config may put in each place; `celo-nnx list parts` prints the same.\n",
    ]
    for kind, table in {**TABLES, "meta.estimator": ESTIMATORS, "meta.augmentation": AUGMENTATIONS}.items():
        made += [f"## {kind}\n", _table(("name", "class", ""), _rows(table))]
    return "\n".join(made)


def _experiments() -> str:
    """Variants, task presets, suites and grids by the first line of their docstrings."""
    from celo_nnx import listing

    made = ["# Configs by name\n", "Files in `experiments/`, in the package as `celo_nnx.experiments`.\n"]
    for kind in ("variants", "tasks", "suites", "grids", "weights", "baselines", "data"):
        _, *lines = listing.lines(kind).splitlines()
        rows = [(f"`{line.split()[0]}`", formulas.linked(" ".join(line.split()[1:]))) for line in lines]
        made += [f"## {kind.capitalize()}\n", _table(("name", ""), rows)]
    return "\n".join(made)


def _commands() -> str:
    """``--help`` of every command."""
    from celo_nnx import cli

    os.environ["COLUMNS"] = "90"
    made = ["# Commands\n", "`celo-nnx COMMAND --help` prints these.\n"]

    def add(parser: object, depth: int) -> None:
        made.append(f"{'#' * depth} {parser.prog}\n\n```text\n{parser.format_help()}```\n")
        for action in parser._actions:
            for sub in dict.fromkeys(getattr(action, "choices", None) or {}) if _is_verbs(action) else ():
                add(action.choices[sub], min(depth + 1, 3))

    add(cli._parser(), 2)
    return "\n".join(made)


def _is_verbs(action: object) -> bool:
    return type(action).__name__ == "_SubParsersAction"
