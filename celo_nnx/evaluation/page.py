"""HTML pages of one look: templates of this folder, filled with escaped data, in files that are whole."""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path
from typing import Any

import jinja2

from celo_nnx.files import refuse_existing

MARK = b'content="celo-nnx report"'  # tells a report of ours, which may be replaced


def render(template: str, **values: Any) -> str:
    """Fills a template; every value is escaped unless it is ``markupsafe.Markup``.

    Args:
      template: name of a file of this folder.
      values: what it mentions.
    """
    folder = importlib.resources.files("celo_nnx.evaluation")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text("utf-8")),
    )
    environment.filters["number"] = number
    return environment.get_template(template).render(values)


def refuse_foreign(path: Path, default: Path, mark: bytes = MARK) -> None:
    """Raises a :class:`~celo_nnx.errors.UserError` unless a file is new, or at its default place and ours.

    Args:
      path: the file that is to be written.
      default: where a newer one replaces an older.
      mark: what one of ours has in its first 1000 bytes.
    """
    if not (path.absolute() == default.absolute() and _ours(path, mark)):
        refuse_existing(path)


def _ours(path: Path, mark: bytes) -> bool:
    if not path.is_file() or path.is_symlink():
        return False
    with open(path, "rb") as file:
        return mark in file.read(1000)


def write(path: Path, text: str) -> Path:
    """Writes a text file so that it is the old one or the new one, whole."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def number(value: float) -> str:
    """A loss or a learning rate to three digits, or the word ``diverged``.

    Example:
      >>> number(0.012345), number(float("inf"))
      ('0.0123', 'diverged')
    """
    return f"{value:.3g}" if abs(value) < float("inf") else "diverged"
