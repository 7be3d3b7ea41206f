"""Results of an evaluation, cell by cell: one JSON line each, and its curves in a file beside it.

A cell is one optimizer tuned on one task: a task, an optimizer, a schedule, a number of steps, seeds and the
config that decides the rest (weights, sizes, data). Its curves are written whole before its line is, so a
line vouches for them by their digest; a kill in between costs that cell. Curves are kept at every step, since
the scores are computed from them. Both files are read as data: keys, types, sizes, shapes and digests are
checked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from celo_nnx.errors import UserError, require
from celo_nnx.evaluation.curves import Curves

FILE_NAME = "cells.jsonl"
LONGEST_LINE = 2**20
MOST_BYTES = 2**31  # of one cell's curves; 10 rates, 3 seeds and 100,000 steps have 12 million


@dataclasses.dataclass(frozen=True)
class Key:
    """What makes two cells the same; a cell that is there is not computed again.

    Attributes:
      task: name in the suite.
      optimizer: name, weights included where it has them.
      schedule: of the learning rate.
      steps: of a run.
      seeds: of the runs.
      config: SHA-256 of the config that decides everything else, from :func:`digest`.
    """

    task: str
    optimizer: str
    schedule: str
    steps: int
    seeds: tuple[int, ...]
    config: str

    def file(self) -> str:
        """The name of the file with the curves."""
        text = json.dumps(dataclasses.astuple(self))
        return f"curves-{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One line.

    Attributes:
      task, optimizer, schedule, steps, seeds: see :class:`Key`.
      learning_rates: all that were tried, ascending.
      training: index of the best by final training loss.
      validation: index of the best by validation loss; None where there was no such set.
      warnings: what is wrong with the choices, none or some.
      floor: the task's least loss, None where unknown.
      measured: seconds, bytes and the like, by name.
      config: what decided the result, as JSON holds it.
      versions: of libraries and machine, by name.
      shapes: of the curves by name: ``losses`` and the held-out sets.
      digest: SHA-256 of the file with the curves.
    """

    task: str
    optimizer: str
    schedule: str
    steps: int
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    training: int
    validation: int | None
    warnings: tuple[str, ...]
    floor: float | None
    measured: dict[str, float]
    config: dict[str, Any]
    versions: dict[str, str]
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    digest: str = ""

    @property
    def key(self) -> Key:
        """What identifies the cell."""
        return Key(self.task, self.optimizer, self.schedule, self.steps, self.seeds, digest(self.config))


def digest(config: dict[str, Any]) -> str:
    """SHA-256 of a config, whatever the order of its keys.

    Raises:
      UserError: it holds what JSON does not.

    Example:
      >>> digest({"a": 1, "b": (2,)}) == digest({"b": [2], "a": 1})
      True
    """
    return hashlib.sha256(_json(config).encode()).hexdigest()


class Cells:
    """The cells of a folder, in the order in which they were added.

    Args:
      folder: made where it is missing.

    Raises:
      UserError: the file of cells is damaged, other than by a last line that a kill has torn, which is left
        out and cut off by the next :meth:`add`.

    Example:
      >>> import tempfile
      >>> cells = Cells(tempfile.mkdtemp())
      >>> len(cells), Key("mlp", "adam", "constant", 100, (0, 1), digest({})) in cells
      (0, False)
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot use {folder} as the results' folder: {error.strerror}") from error
        self.path = self.folder / FILE_NAME
        self._cells: dict[Key, Cell] = {}
        self._end = 0
        if self.path.exists():
            self._read()

    def __len__(self) -> int:
        return len(self._cells)

    def __iter__(self) -> Iterator[Cell]:
        return iter(self._cells.values())

    def __contains__(self, key: Key) -> bool:
        return key in self._cells

    def __getitem__(self, key: Key) -> Cell:
        return self._cells[key]

    def add(self, cell: Cell, curves: Curves) -> Cell:
        """Writes a cell and its curves; both are on the disk when this returns.

        Args:
          cell: without ``shapes`` and ``digest``, which are filled in.
          curves: its runs.

        Returns:
          The cell as it was written.

        Raises:
          UserError: a cell of that key is there, or the curves do not fit the cell.
        """
        require(cell.key not in self._cells, "cell", cell.key, "new: there is one of that key")
        arrays = {"losses": curves.losses, **curves.held_out}
        arrays = {name: np.ascontiguousarray(value, np.float32) for name, value in arrays.items()}
        shapes = {name: value.shape for name, value in arrays.items()}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        data = buffer.getvalue()
        cell = dataclasses.replace(cell, shapes=shapes, digest=hashlib.sha256(data).hexdigest())
        _check(cell, str(self.path))
        path = self.folder / cell.key.file()
        part = path.with_name(path.name + ".part")
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        line = (_json(dataclasses.asdict(cell)) + "\n").encode()
        with open(self.path, "ab") as file:
            file.truncate(self._end)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._end += len(line)
        self._cells[cell.key] = cell
        return cell

    def curves(self, cell: Cell) -> Curves:
        """Reads a cell's curves.

        Raises:
          UserError: the file is missing, too large, altered or not of the cell's shapes.
        """
        path = self.folder / cell.key.file()
        expected = sum(4 * math.prod(shape) for shape in cell.shapes.values())
        most = expected + 4096 * (1 + len(cell.shapes))  # zip and npy headers
        try:
            size = path.stat().st_size
            require(size <= most, f"size of {path}", size, f"at most {most} bytes for the cell's shapes")
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the curves {path}: {error.strerror}") from error
        if hashlib.sha256(data).hexdigest() != cell.digest:
            raise UserError(f"{path} is damaged: its digest is not the one in {self.path}")
        arrays = _arrays(data, path, cell.shapes, most)
        return Curves(arrays.pop("losses"), arrays)

    def _read(self) -> None:
        with open(self.path, "rb") as file:
            number = 0
            while line := file.readline(LONGEST_LINE):
                number += 1
                where = f"{self.path}, line {number}"
                if not line.endswith(b"\n"):
                    require(len(line) < LONGEST_LINE, f"length of {where}", len(line), f"< {LONGEST_LINE}")
                    return  # torn by a kill
                cell = _parse(line, where)
                if cell.key in self._cells:
                    raise UserError(f"{where}: the cell of {cell.optimizer} on {cell.task} is there twice")
                self._cells[cell.key] = cell
                self._end += len(line)


def _arrays(data: bytes, path: Path, shapes: dict[str, tuple[int, ...]], most: int) -> dict[str, np.ndarray]:
    """The arrays of an npz file, which must be these, float32 of these shapes."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as members:
            names = [member.filename for member in members.infolist()]
            size = sum(member.file_size for member in members.infolist())
            if sorted(names) != sorted(f"{name}.npy" for name in shapes) or size > most:
                raise ValueError("it holds other arrays")
            return {name: _array(members.read(f"{name}.npy"), shape) for name, shape in shapes.items()}
    except (ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        words = " ".join(str(error).split())
        raise UserError(f"{path} is not an npz of the cell's curves: {words}") from error


def _array(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """One array of an npz file, its header checked before memory is taken for its values."""
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("an array's format is not 1.0")
    found = np.lib.format.read_array_header_1_0(file)
    if found != (shape, False, np.dtype(np.float32)):
        raise ValueError(f"an array is {found[2]} of {found[0]}, not float32 of {shape}")
    return np.frombuffer(file.read(), np.float32).reshape(shape)


def _parse(line: bytes, where: str) -> Cell:
    try:
        row = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: the file was altered") from error
    names = {field.name for field in dataclasses.fields(Cell)}
    if not isinstance(row, dict) or set(row) != names:
        wrong = sorted(set(row) ^ names) if isinstance(row, dict) else "not an object"
        raise UserError(f"{where}: missing or unknown fields: {wrong}")
    for name in ("seeds", "learning_rates", "warnings"):
        row[name] = tuple(row[name]) if isinstance(row[name], list) else None
    shapes = row["shapes"] if isinstance(row["shapes"], dict) else {}
    row["shapes"] = {name: tuple(s) if isinstance(s, list) else None for name, s in shapes.items()}
    cell = Cell(**row)
    _check(cell, where)
    return cell


def _refuse(constant: str) -> None:
    """JSON has no NaN and no Infinity, though Python reads them."""
    raise ValueError(constant)


def _check(cell: Cell, where: str) -> None:
    """Checks every field's type and that they fit each other."""

    def whole(value: object, least: int, below: float = math.inf) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value < below

    def number(value: object) -> bool:
        # JSON's integers may be too large for a float.
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300

    def table(value: object, good: Any) -> bool:
        return isinstance(value, dict) and all(isinstance(k, str) and good(v) for k, v in value.items())

    rates, seeds = cell.learning_rates or (), cell.seeds or ()
    checks = {
        **{
            k: isinstance(getattr(cell, k), str) and getattr(cell, k)
            for k in ("task", "optimizer", "schedule")
        },
        "steps": whole(cell.steps, 1),
        "seeds": len(seeds) >= 1 and all(whole(s, 0) for s in seeds),
        "learning_rates": len(rates) >= 1
        and all(number(r) and r > 0 for r in rates)
        and list(rates) == sorted(set(rates)),
        "training": whole(cell.training, 0, len(rates)),
        "validation": cell.validation is None or whole(cell.validation, 0, len(rates)),
        "warnings": isinstance(cell.warnings, tuple) and all(isinstance(w, str) for w in cell.warnings),
        "floor": cell.floor is None or number(cell.floor),
        "measured": table(cell.measured, number),
        "config": isinstance(cell.config, dict),
        "versions": table(cell.versions, lambda v: isinstance(v, str)),
        "digest": isinstance(cell.digest, str) and len(cell.digest) == 64,
    }
    for name, good in checks.items():
        require(bool(good), f"{where}: {name}", getattr(cell, name), "as the documentation of Cell says")
    runs = (len(rates), len(seeds))
    shapes = cell.shapes if table(cell.shapes, lambda s: s and all(whole(n, 1) for n in s)) else {}
    fits = shapes.get("losses") == (*runs, cell.steps) and all(
        s[:2] == runs and len(s) == 3 for s in shapes.values()
    )
    small = 4 * sum(math.prod(shape) for shape in shapes.values()) <= MOST_BYTES
    legal = f"losses {(*runs, cell.steps)}, others {(*runs, 'n')}, and at most {MOST_BYTES} bytes"
    require(fits and small, f"{where}: shapes", cell.shapes, legal)


def _json(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}") from error
