"""Pages of the documentation as what can be run: their blocks of code, in order, in one process a page.

A block's language says what happens to it. ``python`` is run, after the page's earlier blocks and with their
names; with a ``title`` it is a file that later commands use. Of ``bash`` every line must be a command that is
known here. A comment before a block says how its commands are tested::

    <!-- test: run -->                 as they stand
    <!-- test: short KEY=VALUE ... --> with these overrides; as they stand in the drill
    <!-- test: drill KEY=VALUE ... --> not at all; in the drill with these overrides
    (nothing)                          cheap ones run, of the others arguments and config are read

Run as a program with ``PAGE FOLDER short|full``, it works through a page in the folder.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r"(?:^ *<!-- test: (?P<how>run|short|drill)(?P<more>[^>]*) -->\n)?"
    r'^(?P<indent> *)```(?P<language>\w*)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^(?P=indent)```',
    re.MULTILINE | re.DOTALL,
)
CHEAP = {"list", "describe", "import", "export", "grid plan"}
# Other programs, which are tested elsewhere or cannot be here, and whether a line of theirs is one.
OTHERS = re.compile(
    r"(python3 -m venv \.venv( && .*)?|\.venv/bin/pip install .*|pip install .*|\. \.venv/bin/activate|cd .*"
    r"|git clone .*|(\.venv/bin/)?(python -m )?pytest .*|(\.venv/bin/)?ruff (check|format) .*"
    r"|(\.venv/bin/)?mkdocs (build --strict|serve)|bash \.ci/.*"
    r"|python -m celo_nnx\.experiments\.training\.(gpt|conv_net|vit|scaling)( .*)?)"
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code; ``how`` its commands are tested (run, short, drill), with ``more`` overrides."""

    language: str
    title: str
    text: str
    how: str
    more: tuple[str, ...]


def pages() -> dict[str, Path]:
    """Returns every page with code by its path from the root."""
    found = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
    found += [*sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "experiments").rglob("*.md"))]
    return {path.relative_to(ROOT).as_posix(): path for path in found}


def blocks(path: Path) -> list[Block]:
    """Returns a page's blocks of code, in order."""
    made = []
    for found in BLOCK.finditer(path.read_text()):
        text = re.sub(f"^{found['indent']}", "", found["text"], flags=re.MULTILINE)
        more = tuple((found["more"] or "").split())
        made.append(Block(found["language"], found["title"] or "", text, found["how"] or "", more))
    return made


def commands(text: str) -> Iterator[str]:
    """Yields the commands of a bash block, without comments."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield shlex.join(words) if words[0] != "." else " ".join(words)


def run(path: Path, full: bool) -> None:
    """Runs a page in the working folder; fails with the block that fails."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(path):
        if block.language == "python" and block.title:
            compile(block.text, block.title, "exec")
            Path(block.title).write_text(block.text)
        elif block.language == "python":
            exec(compile(block.text, f"{path.name}: {block.text.splitlines()[0]}", "exec"), names)
        elif block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "bash":
            for line in commands(block.text):
                print("+", line, flush=True)
                run_command(shlex.split(line), block, full)
        else:
            assert block.language == "text", f"{path}: a block of {block.language!r}"


def run_command(words: list[str], block: Block, full: bool) -> None:
    """Runs a line of a bash block, or reads its arguments."""
    from celo_nnx import cli

    if words[0] == "srun":
        assert "celo-nnx" in words, words
        words = words[words.index("celo-nnx") :]
    if words[0] == "export":
        os.environ.update([words[1].split("=", 1)])
    elif words[0] != "celo-nnx":
        assert OTHERS.fullmatch(" ".join(words)), f"what is {words}?"
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for extras in re.findall(r"\.\[([\w,]+)\]", " ".join(words)):
            assert set(extras.split(",")) <= set(known), extras
    else:
        arguments = words[1:]
        args = cli._parse(arguments)
        name = f"{args.command} {args.kind}" if hasattr(args, "kind") else args.command
        if block.how == ("drill" if full else "short") and hasattr(args, "overrides"):
            suite = args.command == "evaluate"  # whose settings have no section
            arguments += [override for override in block.more if suite != ("." in override.split("=")[0])]
        if block.how in ("run", "short") or (block.how and full) or name in CHEAP:
            assert cli.main(arguments) == 0, words
        else:
            read(args)


def read(args: Any) -> None:
    """Reads what a command that is not run would read first: its config, suite or grid."""
    from celo_nnx.config import load
    from celo_nnx.evaluation.suites import load_suite
    from celo_nnx.grids.grid_file import load_grid
    from celo_nnx.grids.plan import plan
    from celo_nnx.model_shapes import mesh_sizes, model_shapes

    if hasattr(args, "config"):
        path = ROOT / args.config
        load(str(path) if path.is_file() else args.config, args.overrides)
    elif hasattr(args, "suite") and hasattr(args, "overrides"):
        load_suite(args.suite, args.overrides)
    elif args.command == "plan":
        model_shapes(args.model)
        for mesh in args.mesh or ():
            mesh_sizes(mesh)
    elif hasattr(args, "grid"):
        plan(load_grid(args.grid, args.overrides))


if __name__ == "__main__":
    run(ROOT / sys.argv[1], sys.argv[3] == "full")
