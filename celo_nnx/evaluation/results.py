"""What an evaluation's folder says: the suite, the optimizers, their losses and scores. Uses no device.

``evaluation.json`` and the cells are read as data: sizes, names and types are checked, and whatever they
hold, what is wrong is told in one line. An evaluation may be under way. Curves are read one task at a time.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from celo_nnx.errors import UserError
from celo_nnx.evaluation import scores
from celo_nnx.evaluation.cells import FILE_NAME as CELLS_NAME
from celo_nnx.evaluation.cells import Cell, Cells
from celo_nnx.evaluation.curves import Tuned, choose
from celo_nnx.files import read_json, told, write_json

FILE_NAME = "evaluation.json"
ADAM = "adam"  # the label that all are scored against
DEVICES = "devices"  # the name among a cell's versions
NOT_YET = "not yet run"
POINTS = 240  # of a smoothed curve that is kept
MOST = 4096  # optimizers and tasks of an evaluation


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is to be evaluated; the cells beside the file say how far it is.

    Attributes:
      suite: ``name``, ``steps`` (K), ``schedule``, ``seeds`` (a list), ``evaluations``, ``batches`` and
        ``tasks``, by name the complete section of each.
      optimizers: each a ``label``, which cells carry, and what it is ``about``.
      skipped: why a task was left out, by its name.
      command: the command line that goes on, empty where unknown.
    """

    suite: dict[str, Any]
    optimizers: tuple[dict[str, str], ...]
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    command: str = ""

    @property
    def labels(self) -> tuple[str, ...]:
        """The optimizers' labels, in their order."""
        return tuple(optimizer["label"] for optimizer in self.optimizers)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that are not skipped, in the suite's order."""
        return tuple(name for name in self.suite["tasks"] if name not in self.skipped)


def write_evaluation(folder: Path | str, evaluation: Evaluation) -> Path:
    """Writes ``evaluation.json``, whole or not at all; an older one is replaced.

    Args:
      folder: made where it is missing.
      evaluation: what to write; tuples become lists.

    Returns:
      The file's path.

    Raises:
      UserError: a field is not what :class:`Evaluation` says, or the folder cannot be written to.

    Example:
      >>> import tempfile
      >>> suite = dict(name="one", steps=9, schedule="constant", seeds=[0], evaluations=1, batches=1)
      >>> suite["tasks"] = {"mlp": {"kind": "image_mlp"}}
      >>> folder = tempfile.mkdtemp()
      >>> path = write_evaluation(folder, Evaluation(suite, ({"label": "adam", "about": ""},)))
      >>> read_evaluation(folder).labels
      ('adam',)
    """
    path = Path(folder) / FILE_NAME
    value = dataclasses.asdict(evaluation)
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    _check(value, str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, value)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return path


def read_evaluation(folder: Path | str) -> Evaluation:
    """Reads ``evaluation.json``.

    Raises:
      UserError: there is none, it is damaged, or a field is not what :class:`Evaluation` says.
    """
    path = Path(folder) / FILE_NAME
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise UserError(f"{path} is not a file")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    value = read_json(path)
    if value is None:
        raise UserError(f"{folder} is not the folder of an evaluation: it holds no {FILE_NAME}")
    _check(value, str(path))
    return Evaluation(**value | {"optimizers": tuple(value["optimizers"])})


def _check(value: Any, where: str) -> None:
    """Checks the file's value, all but the inside of the tasks' sections."""

    def demand(good: bool, name: str, found: Any, legal: str) -> None:
        if not good:
            raise UserError(f"{where}: {name} = {_short(found)} is out of range: must be {legal}")

    def fields(found: Any, names: tuple[str, ...], name: str) -> None:
        wrong = sorted(set(found) ^ set(names)) if isinstance(found, dict) else found
        demand(isinstance(found, dict) and not wrong, name, wrong, f"an object of {', '.join(names)}")

    fields(value, tuple(f.name for f in dataclasses.fields(Evaluation)), "missing or unknown fields")
    suite, optimizers, skipped = value["suite"], value["optimizers"], value["skipped"]
    names = ("name", "steps", "schedule", "seeds", "evaluations", "batches", "tasks")
    fields(suite, names, "missing or unknown fields of suite")
    for name in ("name", "schedule"):
        demand(_name(suite[name]), f"suite.{name}", suite[name], "a printable text that is not empty")
    known = suite["schedule"] in scores.LENGTHS
    demand(known, "suite.schedule", suite["schedule"], f"one of {', '.join(scores.LENGTHS)}")
    for name in ("steps", "evaluations", "batches"):
        demand(_whole(suite[name], 1), f"suite.{name}", suite[name], "an integer >= 1")
    seeds, tasks = suite["seeds"], suite["tasks"]
    good = isinstance(seeds, (list, tuple)) and 1 <= len(seeds) <= MOST and all(_whole(s, 0) for s in seeds)
    demand(good and len(set(seeds)) == len(seeds), "suite.seeds", seeds, "a list of different integers >= 0")
    good = isinstance(tasks, dict) and 1 <= len(tasks) <= MOST and all(map(_name, tasks))
    good = good and all(isinstance(section, dict) for section in tasks.values())
    demand(good, "suite.tasks", tasks, f"1 to {MOST} sections by printable name")
    good = isinstance(optimizers, (list, tuple)) and 1 <= len(optimizers) <= MOST
    demand(good, "optimizers", optimizers, f"a list of 1 to {MOST}")
    for optimizer in optimizers:
        fields(optimizer, ("label", "about"), "an optimizer")
        good = _name(optimizer["label"]) and isinstance(optimizer["about"], str)
        demand(good, "an optimizer", optimizer, "a printable label and a text")
    labels = [optimizer["label"] for optimizer in optimizers]
    demand(len(set(labels)) == len(labels), "optimizers", labels, "of different labels")
    good = isinstance(skipped, dict) and all(_name(k) and isinstance(v, str) for k, v in skipped.items())
    demand(good, "skipped", skipped, "reasons by printable name of a task")
    demand(isinstance(value["command"], str), "command", value["command"], "a text")


def _name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**53


def _short(value: Any) -> str:
    try:
        return ascii(value)[:200]
    except RecursionError:
        return "(too deeply nested)"


@dataclasses.dataclass(frozen=True)
class Choice:
    """An optimizer's runs on a task at one learning rate.

    Attributes:
      learning_rate: the one that was chosen.
      final: final training losses as :func:`~celo_nnx.evaluation.scores.final_loss`, ``[n_seeds]``.
      held_out: by set, its loss at the end, ``[n_seeds]``.
    """

    learning_rate: float
    final: np.ndarray
    held_out: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Entry:
    """An optimizer on a task; losses of diverged runs are ``inf``.

    Attributes:
      cell: what was run.
      tuned: final losses at every learning rate, and the choice by them.
      training: the runs at the learning rate that training losses choose.
      validation: those at the one that validation losses choose; None without such a set.
      at: steps of the kept points, ``[points]``.
      course: smoothed training losses there, at the learning rate chosen by training, ``[n_seeds, points]``.
      score: final-loss scores of ``training``, ``[n_seeds]``; None where there are none.
      speedup: its speedups, ``[n_seeds]``; None without Adam.
      at_least: whether each speedup is only a lower bound, ``[n_seeds]``.
    """

    cell: Cell
    tuned: Tuned
    training: Choice
    validation: Choice | None
    at: np.ndarray
    course: np.ndarray
    score: np.ndarray | None = None
    speedup: np.ndarray | None = None
    at_least: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """What is known of a task.

    Attributes:
      name: in the suite.
      floor: the least loss, None where unknown.
      cap: the largest speedup that Adam's runs can show, 0 until those of all lengths are there.
      entries: by label, of the optimizers that have run, in the evaluation's order.
      longer: Adam's runs of other lengths than K, longer and, where the learning rate decays, shorter.
      note: empty, or why there are no final-loss scores although Adam has run.
    """

    name: str
    floor: float | None
    cap: float
    entries: dict[str, Entry]
    longer: tuple[Cell, ...]
    note: str


@dataclasses.dataclass(frozen=True)
class Results:
    """What a folder holds.

    Attributes:
      folder: where it lies.
      evaluation: what is evaluated.
      tasks: all that are not skipped, whether or not something has run on them.
      strays: how many cells belong to none of them, such as those of optimizers that are no longer listed.
    """

    folder: Path
    evaluation: Evaluation
    tasks: tuple[TaskResult, ...]
    strays: int

    def under_way(self) -> dict[str, int]:
        """Returns the optimizers that others wait for no longer, with how many tasks each has finished.

        They have finished fewer tasks than the one that is furthest, less one. Adam, which all are scored
        against, is never among them.
        """
        done = {label: sum(label in task.entries for task in self.tasks) for label in self.evaluation.labels}
        enough = max(done.values()) - 1
        return {label: count for label, count in done.items() if count < enough and label != ADAM}

    def missing(self) -> dict[str, str]:
        """Returns what keeps a task out of the aggregates, by its name: runs to be done, or no scores."""
        behind, out = self.under_way(), {}
        labels = [label for label in self.evaluation.labels if label not in behind]
        for task in self.tasks:
            absent = [label for label in labels if label not in task.entries]
            if absent:
                out[task.name] = f"{NOT_YET}: {', '.join(absent)}"
            elif ADAM in labels and not task.cap:
                out[task.name] = f"{NOT_YET}: adam's runs of other lengths"
            elif task.note:
                out[task.name] = task.note
        return out

    def finished(self) -> tuple[TaskResult, ...]:
        """Returns the tasks, over which is aggregated, that all have finished but those under way."""
        missing = self.missing()
        return tuple(task for task in self.tasks if task.name not in missing)

    def matrix(self, label: str, what: str) -> np.ndarray:
        """Returns a field of :class:`Entry` over the finished tasks, ``[n_seeds, n_tasks]``."""
        return np.stack([getattr(task.entries[label], what) for task in self.finished()], axis=1)


def load_results(folder: Path | str) -> Results:
    """Reads an evaluation's folder, whose evaluation may be under way, and computes all scores.

    Args:
      folder: of ``celo-nnx evaluate``; nothing is written to it.

    Returns:
      Losses, learning rates and scores; without cells of Adam, no scores.

    Raises:
      UserError: the folder is none of an evaluation, a file is damaged, or a cell does not belong to it.

    Example:
      >>> load_results("runs/smoke").matrix("celo2", "score").shape  # doctest: +SKIP
      (3, 3)
    """
    evaluation = read_evaluation(folder)
    path = Path(folder) / CELLS_NAME
    with told(path):
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a file")
        cells = Cells(folder)
    table = _table(cells, evaluation)
    tasks = tuple(_task(cells, evaluation, name, table) for name in evaluation.tasks)
    return Results(Path(folder), evaluation, tasks, len(cells) - len(table))


_Table = dict[tuple[str, str, int], Cell]


def _table(cells: Cells, evaluation: Evaluation) -> _Table:
    """The cells that belong to the evaluation, by task, label and steps."""
    suite, table = evaluation.suite, {}
    steps, seeds = suite["steps"], tuple(suite["seeds"])
    lengths_of_adam = scores.adam_steps(suite["schedule"], steps)
    for cell in cells:
        lengths = lengths_of_adam if cell.optimizer == ADAM else (steps,)
        known = cell.task in evaluation.tasks and cell.optimizer in evaluation.labels
        if not known or cell.steps not in lengths:
            continue
        where = f"{cells.path}: the cell of {ascii(cell.optimizer)} on {ascii(cell.task)}"
        if (cell.schedule, cell.seeds) != (suite["schedule"], seeds):
            raise UserError(f"{where} has a schedule or seeds other than those of {FILE_NAME}")
        key = (cell.task, cell.optimizer, cell.steps)
        if key in table:
            raise UserError(f"{where} with {cell.steps} steps is there twice, with different configs")
        table[key] = cell
    return table


def _task(cells: Cells, evaluation: Evaluation, name: str, table: _Table) -> TaskResult:
    steps, schedule = evaluation.suite["steps"], evaluation.suite["schedule"]
    own = {label: table[name, label, steps] for label in evaluation.labels if (name, label, steps) in table}
    _, *others = scores.adam_steps(schedule, steps)
    longer = [table[name, ADAM, n] for n in others if (name, ADAM, n) in table]
    floors = {cell.floor for cell in own.values()}
    if len(floors) > 1:
        raise UserError(f"{cells.path}: the cells of {ascii(name)} have different floors: {floors}")
    floor = floors.pop() if floors else None
    entries = {label: _entry(cells, cell) for label, cell in own.items()}
    if ADAM not in entries:
        return TaskResult(name, floor, 0.0, entries, tuple(longer), "")
    runs = [cells.curves(cell).losses for cell in (own[ADAM], *longer)]
    make = scores.envelope if schedule == "constant" else scores.envelope_of_ends
    envelope = make(runs, steps)
    adam, note = entries[ADAM].training.final, ""
    for label, entry in entries.items():
        speedup, at_least = scores.speedup(entry.training.final, envelope, steps)
        try:
            score = scores.final_loss_score(adam, entry.training.final, floor)
        except UserError as error:
            score, note = None, str(error)
        entries[label] = dataclasses.replace(entry, score=score, speedup=speedup, at_least=at_least)
    cap = len(envelope) / steps if len(longer) == len(others) else 0.0
    return TaskResult(name, floor, cap, entries, tuple(longer), note)


def _entry(cells: Cells, cell: Cell) -> Entry:
    """The losses of a cell, without scores; its choices must be those that its curves make."""
    curves = cells.curves(cell)
    smoothed = scores.smooth(curves.losses)
    tuned = choose(smoothed[..., -1], cell.learning_rates)
    ends = {name: value[..., -1] for name, value in curves.held_out.items()}
    last = {name: np.where(np.isfinite(end), end, np.float32(np.inf)) for name, end in ends.items()}
    other = choose(last["validation"], cell.learning_rates).best if "validation" in last else None
    if (tuned.best, other) != (cell.training, cell.validation):
        raise UserError(
            f"{cells.path} is damaged: the curves of {ascii(cell.optimizer)} on {ascii(cell.task)} choose "
            "learning rates other than the cell's"
        )

    def choice(best: int) -> Choice:
        held_out = {name: value[best] for name, value in last.items()}
        return Choice(cell.learning_rates[best], tuned.final[best], held_out)

    at = np.unique(np.linspace(0, cell.steps - 1, POINTS).round().astype(int))
    validation = None if other is None else choice(other)
    return Entry(cell, tuned, choice(tuned.best), validation, at + 1, smoothed[tuned.best][:, at])
