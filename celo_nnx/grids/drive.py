"""A grid's folder: the plan is written down, what has changed is refused, an engine does the rest."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from celo_nnx import lock
from celo_nnx.errors import UserError, printable
from celo_nnx.files import read_json, told
from celo_nnx.grids import local, slurm
from celo_nnx.grids.grid_file import Grid
from celo_nnx.grids.local import Engine
from celo_nnx.grids.plan import Cell, plan
from celo_nnx.grids.store import (
    CANCEL_NAME,
    CELL_NAME,
    GRID_NAME,
    CellFolder,
    Entry,
    folder_of,
    is_grid,
    read_grid,
    write_grid,
)
from celo_nnx.run_files import differences

PATIENCE = local.PATIENCE + 30.0  # seconds that a driver has to stop: its cells save first
SHOWN = 4  # differences that a message names


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of :func:`run` ended.

    Attributes:
      folder: of the grid.
      cells: how many the grid has.
      done: how many have their result.
      computed: how many of them this call has added.
      failed: how many have used up their attempts.
      damaged: how many have a result that cannot be read, which is left as it is.
      stopped_by: the number of the signal that ended the call, 0 for none.
      seconds: wall-clock time of this call.
    """

    folder: str
    cells: int
    done: int
    computed: int
    failed: int
    damaged: int
    stopped_by: int
    seconds: float


def run(
    grid: Grid,
    folder: Path | str,
    engine: Engine,
    *,
    accept_changed: bool = False,
    command: str = "",
    stop: Callable[[], int] | None = None,
) -> Outcome:
    """Runs the cells of a grid that have no result yet.

    Args:
      grid: from :func:`celo_nnx.grids.grid_file.load_grid`.
      folder: made where it is missing, gone on with where it is this grid's.
      engine: runs cells, such as :class:`celo_nnx.grids.local.Local`.
      accept_changed: run cells anew whose config is not that of the cell of the same labels that has begun;
        the older one's folder stays, and is listed no longer.
      command: the command line that goes on with this grid.
      stop: a true value ends the call; see :func:`celo_nnx.training.stop_on_signals`.

    Returns:
      What was done.

    Raises:
      UserError: a mistake in the grid, a folder of something else or in use, cells that have changed.

    Example:
      >>> run(load_grid("mlp_size"), "runs/mlp_size", Local(jobs=2))  # doctest: +SKIP
    """
    begin, stop = time.monotonic(), stop or (lambda: 0)
    cells, folder = plan(grid), Path(folder)
    asked = lambda: stop() or signal.SIGTERM * (folder / CANCEL_NAME).exists()  # noqa: E731
    with told(folder), _held(folder):
        (folder / CANCEL_NAME).unlink(missing_ok=True)
        if (folder / GRID_NAME).exists() and not accept_changed:
            _refuse_changed(folder, grid, cells)
        write_grid(folder, grid, cells, command)
        folders = [folder_of(folder, cell.id) for cell in cells]
        for cell, one in zip(cells, folders, strict=True):
            if one.state() not in ("done", "running"):
                one.write(cell)
        names = {folder_of(folder, cell.id).path: cell.name for cell in cells}
        before = [one.state() for one in folders]
        left = len(cells) - before.count("done") - before.count("damaged")
        teller = _Teller(names, before.count("done"), left)
        for one, state in zip(folders, before, strict=True):
            if state == "damaged":
                teller(state, one)
        engine(folders, asked, teller)
    after = [one.state() for one in folders]
    done, failed, damaged = (after.count(state) for state in ("done", "failed", "damaged"))
    computed = done - before.count("done")
    signum = int(asked()) if done < len(cells) else 0
    seconds = round(time.monotonic() - begin, 1)
    return Outcome(str(folder), len(cells), done, computed, failed, damaged, signum, seconds)


def cancel(folder: Path | str) -> int:
    """Has the driver of a grid stop, wherever it runs, and ends the grid's jobs in Slurm; cells save.

    Args:
      folder: of the grid.

    Returns:
      How many jobs were queued or ran.

    Raises:
      UserError: no grid, a driver that does not stop, or Slurm cannot be asked.
    """
    folder = read_grid(folder).path
    with told(folder):
        (folder / CANCEL_NAME).touch()
        end = time.monotonic() + PATIENCE
        while lock.held(folder):  # before the jobs are counted: it may be submitting some
            if time.monotonic() > end:
                raise UserError(
                    f"the driver of {folder} has not stopped in {PATIENCE:.0f} s: is it suspended?"
                )
            time.sleep(0.1)
        return slurm.cancel(folder)


class _Teller:
    """Tells of cells on stderr, a line each."""

    def __init__(self, names: dict[Path, str], done: int, left: int) -> None:
        self._names, self._done, self._all = names, done, len(names)
        self._say(f"{left} cells to run, {done} are done" if done else f"{left} cells to run")

    def _say(self, text: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            print(text, file=sys.stderr, flush=True)

    def __call__(self, event: str, folder: CellFolder) -> None:
        self._done += event == "done"
        more = ""
        if event == "done":
            result = folder.result() or {}
            more = f"  {told_outcome(result.get('outcome', {}))}"
        elif event == "damaged":
            more = f"  {printable(folder.damage())}"
        elif event in ("retried", "failed"):
            more = (
                f"  {folder.failure() or 'ended'} (log: {shlex.quote(os.path.relpath(folder.path / 'log'))})"
            )
        words = {"retried": "failed, to be tried again", "adopted": "already under way"}
        name = self._names[folder.path]
        self._say(f"[{self._done}/{self._all}] {name}: {words.get(event, event)}{more}")


def told_outcome(outcome: dict[str, Any]) -> str:
    """Returns a result in a few words.

    Example:
      >>> told_outcome({"meta_loss": 1.23456, "score": 1.1})
      'meta-loss 1.235, score 1.1'
    """
    words = {"meta_loss": "meta-loss", "score": "score", "speedup": "speedup"}
    out = []
    for key, word in words.items():
        if key in outcome:
            value = outcome[key]
            out.append(f"{word} {value:.4g}" if isinstance(value, (int, float)) else f"{word} not finite")
    return ", ".join(out)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Makes the folder, unless it holds something else, and keeps other drivers out."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name another --run-dir")
    others = sorted(p.name for p in folder.iterdir() if p.name != lock.LOCK_NAME) if folder.exists() else []
    others = [name for name in others if not name.startswith(f"{GRID_NAME}.")]  # of a start that was killed
    if others and not is_grid(folder):
        raise UserError(
            f"{folder} holds {others[0]!r} and no {GRID_NAME} of a grid: name a new --run-dir, so that "
            "nothing is overwritten"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with lock.hold(folder):
        yield


def _refuse_changed(folder: Path, grid: Grid, cells: Sequence[Cell]) -> None:
    """Raises a :class:`UserError` where the folder is another grid's, or cells that have begun changed."""
    before = read_grid(folder)
    if before.name != grid.name:
        raise UserError(f"{folder} is of the grid {before.name!r}, not {grid.name!r}; name another --run-dir")
    then, ids = {_place(entry): entry for entry in before.cells}, {cell.id for cell in cells}
    changed, found = 0, {}
    for cell in cells:
        entry = then.get(_place(cell))
        if entry is None or entry.id in ids or not entry.folder.starts():  # it may only have a new label
            continue
        changed += 1
        old = read_json(entry.folder.path / CELL_NAME) or {}
        found |= {key: (mine, theirs) for key, mine, theirs in _compared(cell, old)}
    if not changed:
        return
    text = "; ".join(f"{key} = {mine!r} here, {theirs!r} there" for key, (mine, theirs) in found.items())
    if len(found) > SHOWN:
        shown = list(found.items())[:SHOWN]
        text = "; ".join(f"{key} = {mine!r} here, {theirs!r} there" for key, (mine, theirs) in shown)
        text += f"; and {len(found) - SHOWN} more"
    raise UserError(
        f"{changed} cells of {folder} have begun with another config: {text}; --accept-changed runs them "
        "anew and leaves the old folders, or name another --run-dir"
    )


def _place(cell: Cell | Entry) -> tuple[Any, ...]:
    return tuple(sorted(cell.labels.items())), cell.extra, cell.seed


def _compared(cell: Cell, old: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value here, value there) of what decides a cell's result."""
    config = old.get("config") or {}
    out = differences(cell.config, config)
    mine, theirs = cell.config["run"]["iterations"], config.get("run", {}).get("iterations")
    out += [("run.iterations", mine, theirs)] if mine != theirs else []
    suites = [{} if suite is None else suite.get("settings", {}) for suite in (cell.suite, old.get("suite"))]
    return out + [(f"suite.{key}", a, b) for key, a, b in differences(*suites)]
