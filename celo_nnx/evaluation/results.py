"""What an evaluation's folder says: the suite, the optimizers, their losses and scores. Needs no JAX itself.

``evaluation.json`` is read as data: sizes, names and types are checked, and whatever it holds, what is wrong
is told in one line.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from celo_nnx.errors import UserError
from celo_nnx.files import read_json, write_json

FILE_NAME = "evaluation.json"
MOST = 4096  # optimizers and tasks of an evaluation


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is to be evaluated; the cells beside the file say how far it is.

    Attributes:
      suite: ``name``, ``steps`` (K), ``schedule``, ``seeds`` (a list), ``evaluations``, ``batches`` and
        ``tasks``, by name the complete section of each.
      optimizers: each a ``label``, which cells carry, and what it is ``about``.
      skipped: why a task was left out, by its name.
    """

    suite: dict[str, Any]
    optimizers: tuple[dict[str, str], ...]
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)

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
    except (TypeError, ValueError) as error:
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
    return Evaluation(value["suite"], tuple(value["optimizers"]), value["skipped"])


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


def _name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**53


def _short(value: Any) -> str:
    try:
        return ascii(value)[:200]
    except RecursionError:
        return "(too deeply nested)"
