"""Grid files: ``get_config() -> ConfigDict`` with a question, a base config, axes, seeds and a suite."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from celo_nnx import config as configs
from celo_nnx.errors import UserError, is_integer, is_name, require, unknown

Labels = dict[str, str]
MOST = 4096  # cells of a grid; a product of axes grows faster than one thinks


@dataclasses.dataclass(frozen=True)
class Grid:
    """What a grid file says.

    Attributes:
      name: the file's, without its ending.
      question: what the grid answers, in one sentence.
      base: the config that all cells start from, as ``celo-nnx train`` takes it.
      overrides: changes to it that all cells share.
      axes: by name the overrides of every label; the first label is what the others are compared with. A
        label of several overrides changes them together.
      cells: further cells by label, beside the product of the axes; they are compared with the cell of all
        first labels.
      skip: conditions, each labels by axis; a combination that meets all of one's is left out.
      seeds: of every cell.
      suite: what theta is evaluated on, empty for nothing.
      suite_overrides: changes to the suite.

    Raises:
      UserError: a value of another form.
    """

    name: str
    question: str
    base: str
    overrides: tuple[str, ...] = ()
    axes: Mapping[str, Mapping[str, tuple[str, ...]]] = dataclasses.field(default_factory=dict)
    cells: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    skip: tuple[Mapping[str, tuple[str, ...]], ...] = ()
    seeds: tuple[int, ...] = (0,)
    suite: str = ""
    suite_overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks every value; keys of configs are checked when the cells are planned."""
        for name in ("question", "base"):
            value = getattr(self, name)
            require(isinstance(value, str) and value.strip() != "", name, value, "a text")
        require(isinstance(self.suite, str), "suite", self.suite, "a suite's name, or '' for none")
        for name in ("overrides", "suite_overrides"):
            object.__setattr__(self, name, _overrides(getattr(self, name), name))
        axes = {name: _labels(labels, f"axis {name!r}") for name, labels in _pairs(self.axes, "axes").items()}
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "cells", _labels(self.cells, "cells") if self.cells else {})
        object.__setattr__(self, "skip", tuple(_conditions(self.skip, axes)))
        seeds = self.seeds
        good = isinstance(seeds, (tuple, list)) and len(seeds) >= 1
        good = good and all(is_integer(s) and 0 <= s < 2**32 for s in seeds) and len(set(seeds)) == len(seeds)
        require(good, "seeds", seeds, "a tuple of different integers from 0 to 2**32 - 1")
        object.__setattr__(self, "seeds", tuple(seeds))
        require(bool(axes or self.cells), "axes", self.axes, "one axis or more, where there are no cells")

    def variants(self) -> Iterator[tuple[Labels, str, tuple[str, ...]]]:
        """Yields (labels by axis, label of a further cell or "", overrides) of every variant."""
        if self.axes:
            for chosen in itertools.product(*self.axes.values()):
                labels = dict(zip(self.axes, chosen, strict=True))
                if not any(_meets(labels, condition) for condition in self.skip):
                    changes = (self.axes[axis][label] for axis, label in labels.items())
                    yield labels, "", tuple(itertools.chain(*changes))
        for label, changes in self.cells.items():
            yield {}, label, changes


def load_grid(source: str, overrides: Iterable[str] = ()) -> Grid:
    """Reads a grid.

    Args:
      source: the name of one of :func:`grids`, or a ``FILE.py``.
      overrides: ``key=value`` for all cells, after the file's own and before those of the axes.

    Returns:
      The grid.

    Raises:
      UserError: no such grid, or a file that is none.

    Example:
      >>> list(load_grid("orthogonalization").axes)
      ['step', 'rule']
    """
    config = _read(source)
    known = [field.name for field in dataclasses.fields(Grid) if field.name != "name"]
    for key in config:
        if key not in known:
            raise unknown(f"setting of the grid {source},", key, known)
    for key in ("question", "base"):
        if key not in config:
            raise UserError(f"the grid {source} has no setting {key!r}")
    try:
        grid = Grid(name=Path(source).stem, **{key: config[key] for key in config})
    except UserError as error:
        raise UserError(f"the grid {source}: {error}") from None
    return dataclasses.replace(grid, overrides=(*grid.overrides, *overrides))


def grids() -> dict[str, str]:
    """Returns the question of every grid that has a name, the first line of its docstring."""
    from celo_nnx.experiments import grids as package

    modules = {info.name: _module(info.name) for info in pkgutil.iter_modules(package.__path__)}
    return {name: (module.__doc__ or "").split("\n")[0] for name, module in modules.items()}


def _module(name: str) -> Any:
    return importlib.import_module(f"celo_nnx.experiments.grids.{name}")


def _read(source: str) -> ConfigDict:
    if source.endswith(".py"):
        return configs.run_file(source)
    if source not in (known := grids()):
        raise unknown("grid", source, known)
    return configs.run_get_config(_module(source), "", source)


def _pairs(value: Any, what: str) -> dict[str, Any]:
    """Pairs ``(name, value)`` as a dict; a dict is one. A ConfigDict would sort its keys."""
    legal = f"a tuple of pairs ({'axis' if what == 'axes' else 'label'}, ...), in their order"
    if isinstance(value, ConfigDict):
        require(len(value) == 0, what, list(value), legal)
        return {}
    if isinstance(value, Mapping):
        return dict(value)
    good = isinstance(value, (tuple, list)) and all(
        isinstance(p, (tuple, list)) and len(p) == 2 and isinstance(p[0], str) and p[0] for p in value
    )
    require(good, what, value, legal)
    names = [name for name, _ in value]
    require(len(set(names)) == len(names), what, names, "different names")
    return dict(value)


def _labels(value: Any, where: str) -> dict[str, tuple[str, ...]]:
    found = _pairs(value, where)
    require(len(found) >= 1, where, value, "one label or more")
    for label in found:
        require(isinstance(label, str) and label != "", f"label of {where}", label, "a text")
    return {label: _overrides(changes, f"{where}, label {label!r}") for label, changes in found.items()}


def _overrides(value: Any, where: str) -> tuple[str, ...]:
    good = isinstance(value, (tuple, list)) and all(isinstance(text, str) for text in value)
    require(good, where, value, "a tuple of overrides KEY=VALUE")
    for key, _ in configs.split_overrides(value):
        if key == "seed":
            raise UserError(f"{where} sets the seed; give the grid's seeds")
    return tuple(value)


def _conditions(skip: Any, axes: Mapping[str, Any]) -> Iterator[dict[str, tuple[str, ...]]]:
    """Conditions with every value as a tuple of labels."""
    legal = "a tuple of conditions, each a dict of labels by axis"
    good = isinstance(skip, (tuple, list)) and all(isinstance(c, Mapping) and len(c) for c in skip)
    require(good, "skip", skip, legal)
    for condition in skip:
        for axis, labels in condition.items():
            if axis not in axes:
                raise unknown("axis in skip,", axis, axes)
            require(isinstance(labels, (str, tuple, list)), f"axis {axis!r} in skip", labels, "labels")
            for label in [labels] if isinstance(labels, str) else labels:
                if not is_name(label, axes[axis]):
                    raise unknown(f"label of axis {axis!r} in skip,", label, axes[axis])
        yield {axis: (x,) if isinstance(x, str) else tuple(x) for axis, x in condition.items()}


def _meets(labels: Labels, condition: Mapping[str, tuple[str, ...]]) -> bool:
    return all(labels[axis] in legal for axis, legal in condition.items())
