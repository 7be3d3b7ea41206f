"""What ``celo-nnx grid plan`` and ``grid status`` print: cells as lines. Starts nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from celo_nnx.errors import UserError, printable
from celo_nnx.grids.drive import told_outcome
from celo_nnx.grids.grid_file import Grid
from celo_nnx.grids.plan import Cell, differing
from celo_nnx.grids.slurm import queued
from celo_nnx.grids.store import STATES, CellFolder, GridFolder
from celo_nnx.run_files import flat
from celo_nnx.run_folder import RunFolder

WIDE = 60  # characters of a value


def plan_lines(grid: Grid, cells: Sequence[Cell]) -> list[str]:
    """Returns the question, the cells and in what their configs differ.

    Args:
      grid: whose cells they are.
      cells: from :func:`celo_nnx.grids.plan.plan`.

    Example:
      >>> print(*plan_lines(grid, plan(grid)), sep="\\n")  # doctest: +SKIP
    """
    iterations = sum(cell.config["run"]["iterations"] for cell in cells)
    keys = differing([cell.config for cell in cells])
    out = [grid.question, "", f"base  {' '.join([grid.base, *grid.overrides])}"]
    out += [f"suite {' '.join([grid.suite, *grid.suite_overrides])}"] if grid.suite else []
    head = ["id", "cell", "iterations"]
    rows = [[cell.id, cell.name, f"{cell.config['run']['iterations']:,}"] for cell in cells]
    out += ["", *table([head, *rows]), "", "what differs, by value"]
    for key in keys:
        values = Counter(json.dumps(flat(cell.config).get(key, "(absent)")) for cell in cells)
        out.append(f"  {key}: " + "; ".join(f"{short(v)} ({n})" for v, n in values.items()))
    out += ["", f"{len(cells)} cells, {iterations:,} meta-iterations in all"]
    return out


def status_lines(grid: GridFolder) -> list[str]:
    """Returns a line for each cell, and how many there are in each state.

    Args:
      grid: as last read.

    Example:
      >>> print(*status_lines(read_grid("runs/grid")), sep="\\n")  # doctest: +SKIP
    """
    rows, states = [["id", "cell", "state", "iteration", "starts", ""]], Counter()
    jobs = queued(grid.path)
    for entry in grid.cells:
        state = entry.folder.state()
        states[state] += 1
        done = f"{progress(entry.folder):,}/{entry.iterations:,}"
        starts = str(entry.folder.starts())
        rows.append([entry.id, printable(entry.name), state, done, starts, remark(entry.folder, state, jobs)])
    counts = ", ".join(f"{states[state]} {state}" for state in STATES if states[state])
    return [*table(rows), "", f"{len(grid.cells)} cells: {counts}"]


def remark(folder: CellFolder, state: str, jobs: Mapping[str, str]) -> str:
    """Returns a cell's numbers, the state of its job in Slurm, or what went wrong."""
    if state == "done":
        return told_outcome((folder.result() or {})["outcome"])
    if state == "damaged":
        return printable(folder.damage())
    if folder.path.name in jobs:
        return f"Slurm: {jobs[folder.path.name].lower()}"
    return printable(short(folder.failure())) if folder.failure() else ""


def progress(folder: CellFolder) -> int:
    """Returns the meta-iterations that a cell has logged."""
    try:
        return RunFolder(folder.run_dir).iteration
    except UserError:
        return 0


def short(text: str) -> str:
    """Returns a text cut to a width.

    Example:
      >>> len(short("x" * 100))
      60
    """
    return text if len(text) <= WIDE else text[: WIDE - 3] + "..."


def table(rows: Sequence[Sequence[Any]]) -> list[str]:
    """Returns rows as lines whose columns are aligned.

    Example:
      >>> table([["a", "b"], ["long", "c"]])
      ['a     b', 'long  c']
    """
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(str(x).ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in rows]
