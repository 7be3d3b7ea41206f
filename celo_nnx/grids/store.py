"""Folders of grids and cells: what they hold, read as data, and the state that it shows."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from celo_nnx import lock
from celo_nnx.errors import UserError
from celo_nnx.files import read_json, told, write_json
from celo_nnx.grids.grid_file import Grid
from celo_nnx.grids.plan import Cell, identify, name_of

KIND = "celo_nnx grid"
CELL_KIND = "celo_nnx grid cell"
GRID_NAME, CELL_NAME, RESULT_NAME = "grid.json", "cell.json", "result.json"
ATTEMPTS_NAME, LOG_NAME, RUN_NAME, EVALUATION_NAME = "attempts.jsonl", "log", "run", "evaluation"
CANCEL_NAME = "cancel"  # a file that asks the grid's driver, wherever it runs, to stop
STATES = ("done", "running", "failed", "damaged", "stopped", "waiting")


class CellFolder:
    """A cell's folder.

    Args:
      path: the folder.

    Example:
      >>> CellFolder("runs/grid/cells/0123456789ab").state()  # doctest: +SKIP
      'done'
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def run_dir(self) -> Path:
        """The run folder of its meta-training."""
        return self.path / RUN_NAME

    @property
    def evaluation(self) -> Path:
        """The folder of its evaluation."""
        return self.path / EVALUATION_NAME

    def write(self, cell: Cell) -> None:
        """Makes the folder, or renews what of ``run`` may change."""
        self.path.mkdir(parents=True, exist_ok=True)
        content = {"kind": CELL_KIND, "id": cell.id, "config": cell.config, "suite": cell.suite}
        if read_json(self.path / CELL_NAME) != content:
            write_json(self.path / CELL_NAME, content)

    def read(self) -> dict[str, Any]:
        """Returns what ``cell.json`` says.

        Raises:
          UserError: there is none, or it is not what its id says.
        """
        content = read_json(self.path / CELL_NAME)
        if not isinstance(content, dict) or content.get("kind") != CELL_KIND:
            raise UserError(f"{self.path} is not a cell of a grid: it holds no {CELL_NAME} of one")
        try:
            found = identify(content["config"], content["suite"])
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path / CELL_NAME} is damaged: {error!r}") from None
        if found != content.get("id"):
            raise UserError(
                f"{self.path / CELL_NAME} was changed: its id is {found}, not {content.get('id')}"
            )
        return content

    def result(self) -> dict[str, Any] | None:
        """Returns the cell's numbers, None while it has none.

        Raises:
          UserError: the file is damaged; the line says how to run the cell again.
        """
        path, again = self.path / RESULT_NAME, "delete it, and grid run runs the cell again"
        try:
            found = read_json(path)
        except UserError as error:
            raise UserError(f"{error}; {again}") from None
        if found is not None and not (isinstance(found, dict) and isinstance(found.get("outcome"), dict)):
            raise UserError(f"{path} is not the result of a cell; {again}")
        return found

    def has_result(self) -> bool:
        """Whether there is a result, damaged or not: such a cell is not run."""
        return (self.path / RESULT_NAME).exists()

    def damage(self) -> str:
        """Returns what is wrong with the result, empty where it can be read or there is none."""
        try:
            self.result()
        except UserError as error:
            return str(error)
        return ""

    def note(self, event: str, **more: Any) -> None:
        """Adds a line to the attempts."""
        row = {
            "event": event,
            "time": round(time.time(), 3),
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        line = json.dumps(row | more) + "\n"
        path = self.path / ATTEMPTS_NAME
        with open(path, "ab") as file:
            file.write(b"\n" * _torn(path) + line.encode())

    def attempts(self) -> list[dict[str, Any]]:
        """Returns the notes, oldest first; torn lines are left out."""
        try:
            lines = (self.path / ATTEMPTS_NAME).read_text("utf-8", "replace").splitlines()
        except OSError:
            return []
        return [row for line in lines if (row := _row(line)) is not None]

    def starts(self) -> int:
        """Returns how many times a process has begun to work here."""
        return sum(row["event"] == "start" for row in self.attempts())

    def failure(self) -> str:
        """Returns why the last attempt failed, empty where it did not."""
        last = next((row for row in reversed(self.attempts())), {})
        return str(last.get("error", "no reason")) if last.get("event") == "failed" else ""

    def mistaken(self) -> bool:
        """Tells whether the last attempt failed by a mistake of the user, which another would repeat."""
        last = next((row for row in reversed(self.attempts())), {})
        return last.get("event") == "failed" and last.get("mistake") is True

    def held(self) -> bool:
        """Tells whether a process works here."""
        return bool(lock.held(self.path))

    def state(self) -> str:
        """Returns one of :data:`STATES`; a stopped cell goes on from its checkpoint."""
        if self.has_result():
            return "damaged" if self.damage() else "done"
        if self.held():
            return "running"
        if self.failure():
            return "failed"
        return "stopped" if self.starts() else "waiting"

    def pid(self) -> int:
        """Returns the process that works here, as far as this machine can tell; 0 for none."""
        last = next((row for row in reversed(self.attempts()) if row["event"] == "start"), {})
        here = last.get("host") == socket.gethostname() and self.held()
        return last["pid"] if here and type(last.get("pid")) is int and last["pid"] > 1 else 0


def _torn(path: Path) -> bool:
    """Whether the last line was cut off, by a full disk or a kill."""
    if not path.stat().st_size:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("event"), str) else None


@dataclasses.dataclass(frozen=True)
class Entry:
    """A cell as ``grid.json`` lists it.

    Attributes:
      id: names its folder.
      labels, extra, seed, overrides: as in :class:`~celo_nnx.grids.plan.Cell`.
      iterations: its meta-iterations.
      folder: its folder.
    """

    id: str
    labels: dict[str, str]
    extra: str
    seed: int
    overrides: tuple[str, ...]
    iterations: int
    folder: CellFolder

    @property
    def variant(self) -> str:
        """Its labels without the seed."""
        return self.extra or " ".join(f"{axis}={label}" for axis, label in self.labels.items())

    @property
    def name(self) -> str:
        """Its labels and seed, for people."""
        return name_of(self.labels, self.extra, self.seed)


@dataclasses.dataclass(frozen=True)
class GridFolder:
    """What a grid's folder says.

    Attributes:
      path: the folder.
      name, question, base, suite, command: texts.
      axes: labels by axis, in their order; the first is what the others are compared with.
      seeds: of every cell.
      cells: in their order.
    """

    path: Path
    name: str
    question: str
    base: str
    suite: str
    command: str
    axes: dict[str, list[str]]
    seeds: list[int]
    cells: tuple[Entry, ...]


def folder_of(path: Path, cell_id: str) -> CellFolder:
    """Returns a cell's folder in a grid's."""
    return CellFolder(path / "cells" / cell_id)


def write_grid(path: Path, grid: Grid, cells: Sequence[Cell], command: str) -> None:
    """Writes ``grid.json``; an older one is replaced."""
    content = {
        "kind": KIND,
        "name": grid.name,
        "question": grid.question,
        "base": grid.base,
        "suite": " ".join([grid.suite, *grid.suite_overrides]),
        "command": command,
        "axes": {axis: list(labels) for axis, labels in grid.axes.items()},
        "seeds": list(grid.seeds),
        "cells": [
            {
                "id": cell.id,
                "labels": cell.labels,
                "extra": cell.extra,
                "seed": cell.seed,
                "overrides": list(cell.overrides),
                "iterations": cell.config["run"]["iterations"],
            }
            for cell in cells
        ],
    }
    if read_json(path / GRID_NAME) != content:
        write_json(path / GRID_NAME, content)


def is_grid(path: Path) -> bool:
    """Tells whether a folder is that of a grid."""
    content = read_json(path / GRID_NAME)
    return isinstance(content, dict) and content.get("kind") == KIND


def read_grid(path: Path | str) -> GridFolder:
    """Reads a grid's folder.

    Raises:
      UserError: it is none, or ``grid.json`` is damaged.

    Example:
      >>> read_grid("runs/grid").seeds  # doctest: +SKIP
      [0, 1, 2]
    """
    path = Path(path)
    with told(path):
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise UserError(f"{path} {what}; name the folder of celo-nnx grid run")
        if not is_grid(path):
            raise UserError(f"{path} is not the folder of a grid: it holds no {GRID_NAME} of one")
        content = read_json(path / GRID_NAME)
    try:
        return _parsed(path, content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path / GRID_NAME} is damaged: {error!r}") from None


def _parsed(path: Path, content: Mapping[str, Any]) -> GridFolder:
    texts = {key: content[key] for key in ("name", "question", "base", "suite", "command")}
    if not all(isinstance(text, str) for text in texts.values()):
        raise ValueError("a text is none")
    axes = {str(axis): [str(label) for label in labels] for axis, labels in content["axes"].items()}
    cells = []
    for row in content["cells"]:
        if not (isinstance(row["id"], str) and row["id"].isalnum()):  # it becomes a path
            raise ValueError(f"id {row['id']!r}")
        labels = {str(axis): str(label) for axis, label in row["labels"].items()}
        if labels and (set(labels) != set(axes) or any(x not in axes[axis] for axis, x in labels.items())):
            raise ValueError(f"labels {labels}")
        overrides = tuple(str(text) for text in row["overrides"])
        folder = folder_of(path, row["id"])
        numbers = int(row["seed"]), overrides, int(row["iterations"])
        cells.append(Entry(row["id"], labels, str(row["extra"]), *numbers, folder))
    seeds = [int(seed) for seed in content["seeds"]]
    return GridFolder(path, axes=axes, seeds=seeds, cells=tuple(cells), **texts)
