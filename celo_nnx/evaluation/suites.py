"""Suites: the tasks on which optimizers are compared, and how long and how often each is trained.

A suite is a config file, ``get_config() -> ConfigDict``, with the fields of :class:`Suite` except its name.
Those that have names lie in ``celo_nnx.experiments.suites``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import pkgutil
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from celo_nnx import config as configs
from celo_nnx.errors import UserError, is_count, is_name, require, unknown
from celo_nnx.evaluation.baselines import SCHEDULES
from celo_nnx.interfaces import Family
from celo_nnx.tasks import build_families, complete, trial
from celo_nnx.tasks.builders import within

EVERY = "tasks.*."
MOST_SEEDS = 1024
MOST_STEPS = 10**8  # Adam's longer runs count in int32 too


@dataclasses.dataclass(frozen=True)
class Suite:
    """Evaluation tasks and the plan of their runs; every default of the tasks is filled in.

    Attributes:
      name: of the suite.
      steps: updates of a run, K.
      schedule: of the learning rate, a key of :data:`~celo_nnx.evaluation.baselines.SCHEDULES`.
      seeds: how many runs of a learning rate, with the seeds ``0 .. seeds - 1``.
      evaluations: evenly spaced held-out evaluations of a run, a divisor of ``steps``.
      batches: held-out batches of a set.
      tasks: sections of tasks by name, each of exactly one family.
      file: SHA-256 of the user's file that the suite comes from, since it is a program and may define tasks;
        empty for a suite that has a name.

    Raises:
      UserError: a value out of range, or a section that is wrong or has several families.

    Example:
      >>> dataclasses.replace(load_suite("smoke"), seeds=5).seeds
      5
    """

    name: str
    steps: int
    schedule: str
    seeds: int
    evaluations: int
    batches: int
    tasks: dict[str, dict[str, Any]]
    file: str = ""

    def __post_init__(self) -> None:
        """Checks every value and completes the sections of tasks."""
        for field in ("steps", "seeds", "evaluations", "batches"):
            value, most = getattr(self, field), MOST_SEEDS if field == "seeds" else MOST_STEPS
            require(is_count(value) and value <= most, field, value, f"an integer from 1 to {most}")
        divides = self.steps % self.evaluations == 0
        require(divides, "evaluations", self.evaluations, f"a divisor of steps = {self.steps}")
        if not is_name(self.schedule, SCHEDULES):
            raise unknown("schedule", self.schedule, SCHEDULES)
        good = isinstance(self.tasks, Mapping) and len(self.tasks) >= 1
        require(good, "tasks", self.tasks, "a section of one or more sections of tasks")
        for name in self.tasks:
            good = re.fullmatch(r"\w[\w-]*", name) is not None  # names are keys and parts of file names
            require(good, "name of a task", name, "letters, digits, '_' and '-'")
        tasks = {name: within(name, _complete, section) for name, section in self.tasks.items()}
        object.__setattr__(self, "tasks", tasks)


# What a suite's config holds; its name is that of the file.
SETTINGS = tuple(field.name for field in dataclasses.fields(Suite) if field.name not in ("name", "file"))


def load_suite(source: str, overrides: Iterable[str] = ()) -> Suite:
    """Loads a suite and applies overrides.

    Args:
      source: a name, a key of :func:`suites`, or a ``FILE.py``.
      overrides: ``key=value``: ``steps=500``, ``tasks.NAME.batch_size=32``, or ``tasks.*.batch_size=32`` for
        every task that has the setting; each as the type of the value that it replaces.

    Returns:
      The suite.

    Raises:
      UserError: an unknown name or key (the nearest one is named), or a value that is not legal.

    Example:
      >>> suite = load_suite("smoke", ["steps=20", "tasks.*.batch_size=8"])
      >>> suite.steps, {section["batch_size"] for section in suite.tasks.values()}
      (20, {8})
    """
    suite = _from_config(*_read(source))
    settings = dataclasses.asdict(suite)
    name = settings.pop("name")
    file = file_digest(source) if source.endswith(".py") else ""
    config = ConfigDict({key: value for key, value in settings.items() if key != "file"})
    for key, text in configs.split_overrides(overrides):
        for one in _everywhere(config, key):
            configs.set_value(config, one, text)
    return Suite(name=name, file=file, **config.to_dict())


def suites() -> dict[str, str]:
    """Returns the first line of the docstring of every suite that has a name."""
    from celo_nnx.experiments import suites as package

    modules = {info.name: _module(info.name) for info in pkgutil.iter_modules(package.__path__)}
    return {name: (module.__doc__ or "").split("\n")[0] for name, module in modules.items()}


def task_family(suite: Suite, name: str, data_dir: str = "") -> Family:
    """Builds a task of a suite, with its data.

    Args:
      suite: of tasks.
      name: which one; the family bears it too.
      data_dir: a folder of data files, looked up first; empty for none.

    Raises:
      UserError: there is no such task, or its data are absent.

    Example:
      >>> task_family(load_suite("smoke"), "mlp").task.features
      64
    """
    if name not in suite.tasks:
        raise unknown(f"task of the suite {suite.name},", name, suite.tasks)
    families = within(name, build_families, suite.tasks[name], data_dir)
    require(len(families) == 1, f"tasks.{name}", [f.name for f in families], "a section of one family")
    return dataclasses.replace(families[0], name=name)


def file_digest(path: str) -> str:
    """SHA-256 of a file that the user names."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _module(name: str) -> Any:
    return importlib.import_module(f"celo_nnx.experiments.suites.{name}")


def _read(source: str) -> tuple[str, ConfigDict]:
    """Returns (the name of a suite, what its ``get_config`` gives)."""
    if source.endswith(".py"):
        return Path(source).stem, configs.run_file(source)
    known = suites()
    if source in known:
        return source, configs.run_get_config(_module(source), "", source)
    if source in configs.presets():
        what = "an optimizer variant" if configs.presets()[source][1] else "a task preset"
        raise UserError(f"{source} is {what}, not a suite; known: {', '.join(sorted(known))}")
    raise unknown("suite", source, known)


def _from_config(name: str, config: ConfigDict) -> Suite:
    """Makes a suite of a config that has all of its fields and no others."""
    for key, what in {"optimizer": "an optimizer variant", "kind": "a task preset"}.items():
        if key in config:
            raise UserError(f"{name} is {what}, not a suite; a suite has {', '.join(SETTINGS)}")
    for key in config:
        if key not in SETTINGS:
            raise unknown(f"setting of the suite {name},", key, SETTINGS)
    for field in SETTINGS:
        if field not in config:
            raise UserError(f"the suite {name} has no setting {field!r}")
    return Suite(name=name, **config.to_dict())


def _everywhere(config: ConfigDict, key: str) -> list[str]:
    """Returns the keys that ``tasks.*.KEY`` stands for; any other key stands for itself."""
    if not key.startswith(EVERY):
        return [key]
    setting = key.removeprefix(EVERY)
    having = [name for name, section in config.tasks.items() if _has(section, setting)]
    if not having:
        known = {one for section in config.tasks.values() for one in section}
        raise unknown("setting of all tasks,", setting, known)
    return [f"tasks.{name}.{setting}" for name in having]


def _has(section: ConfigDict, key: str) -> bool:
    first, _, rest = key.partition(".")
    if not isinstance(section, ConfigDict) or first not in section:
        return False
    return not rest or _has(section[first], rest)


def _complete(section: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a section with every default; checks its values, and that it is of one family."""
    section = complete(section)
    if section.get("vary"):
        raise UserError("tasks.vary yields several families; a task of a suite is one")
    if "datasets" in section:
        one = isinstance(section["datasets"], (tuple, list)) and len(section["datasets"]) == 1
        require(one, "tasks.datasets", section["datasets"], "a tuple of exactly one name")
    if "parts" in section:
        raise UserError("tasks.parts yields several families; a task of a suite is one")
    if "inner" in section:
        within("inner", _complete, section["inner"])
    trial(section)  # now, so that a wrong value is not taken for absent data later
    return section
