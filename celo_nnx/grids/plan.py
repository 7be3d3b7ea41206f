"""The cells of a grid: resolved configs with an id each, checked before anything runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from celo_nnx import phases, run_files
from celo_nnx.config import load
from celo_nnx.errors import UserError
from celo_nnx.evaluation.suites import load_suite
from celo_nnx.grids.grid_file import MOST, Grid, Labels
from celo_nnx.meta.checkpoint import canonical

# Meta-losses of cells that differ here are not of one scale; of an estimator and those nested in a mixture,
# the keys that decide over which inner steps, families and perturbations a meta-loss is a mean.
SCALES = ("tasks", "meta.objective", "meta.unroll", "meta.augmentation", "meta.phases")
OF_ESTIMATOR = ("kind", "truncation", "initial_offset", "batches", "std", "leaf_std", "weights")
OF_ESTIMATOR += ("mode", "weight")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One meta-training, and its evaluation.

    Attributes:
      labels: by axis; empty for a further cell.
      extra: label of a further cell; empty for one of the product.
      seed: of its config.
      overrides: what makes its config of the grid's base.
      config: resolved, as JSON values.
      suite: ``source``, ``overrides`` and the ``settings`` that they give; None for no evaluation.
    """

    labels: Labels
    extra: str
    seed: int
    overrides: tuple[str, ...]
    config: dict[str, Any]
    suite: dict[str, Any] | None

    @property
    def id(self) -> str:
        """First twelve digits of the SHA-256 of all that decides its result; what it is called does not."""
        return identify(self.config, self.suite)

    @property
    def name(self) -> str:
        """Its labels and seed, for people."""
        return name_of(self.labels, self.extra, self.seed)


def identify(config: Mapping[str, Any], suite: Mapping[str, Any] | None) -> str:
    """Returns a cell's id.

    Of ``run``, only the number of meta-iterations decides the result.

    Args:
      config: resolved, as JSON values.
      suite: as in :class:`Cell`.

    Example:
      >>> identify({"seed": 0, "run": {"iterations": 5, "devices": 1}}, None)
      '39e8194ec3fb'
    """
    decisive = {
        "config": {key: value for key, value in config.items() if key != "run"},
        "iterations": config["run"]["iterations"],
        "suite": None if suite is None else suite["settings"],
    }
    return hashlib.sha256(canonical(decisive).encode()).hexdigest()[:12]


def name_of(labels: Mapping[str, str], extra: str, seed: int) -> str:
    """Returns labels and seed for people.

    Example:
      >>> name_of({"rate": "1e-3", "rule": "adam"}, "", 2)
      'rate=1e-3 rule=adam seed=2'
    """
    words = [extra] if extra else [f"{axis}={label}" for axis, label in labels.items()]
    return " ".join([*words, f"seed={seed}"])


def plan(grid: Grid) -> tuple[Cell, ...]:
    """Makes the cells of a grid: all variants with the first seed, then with the next.

    Args:
      grid: from :func:`celo_nnx.grids.grid_file.load_grid`.

    Returns:
      Its cells.

    Raises:
      UserError: an unknown key, a value of the wrong type, two cells of the same config, no cell or too many.

    Example:
      >>> cells = plan(load_grid("mlp_size", ["run.iterations=10"]))  # doctest: +SKIP
    """
    suite = _suite(grid)
    variants = list(grid.variants())
    count = len(variants) * len(grid.seeds)
    if not 1 <= count <= MOST:
        raise UserError(f"the grid {grid.name} has {count} cells; it must have 1 to {MOST}")
    load(grid.base, grid.overrides)  # so that a mistake in them is not told as a cell's
    cells: list[Cell] = []
    for seed in grid.seeds:
        for labels, extra, changes in variants:
            overrides = (*grid.overrides, *changes, f"seed={seed}")
            try:
                config = load(grid.base, overrides)
                phases.plan(config)
                settings = run_files.resolve(config)
                run_files.check_settings(settings)
            except UserError as error:
                raise UserError(f"cell {name_of(labels, extra, seed)}: {error}") from None
            cells.append(Cell(labels, extra, seed, overrides, settings, suite))
    _refuse_twins(cells)
    return tuple(cells)


def differing(configs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns the dotted keys in which configs differ, ``seed`` and ``run`` left out but for the iterations.

    Example:
      >>> differing([{"a": {"b": 1}, "seed": 0}, {"a": {"b": 2}, "seed": 1}])
      ['a.b']
    """
    flats = [run_files.flat(config) for config in configs]
    keys = sorted(set().union(*flats))
    ignored = [key for key in keys if key == "seed" or key.split(".")[0] == "run" and key != "run.iterations"]
    values = {key: {json.dumps(flat.get(key, "(absent)")) for flat in flats} for key in keys}
    return [key for key in keys if key not in ignored and len(values[key]) > 1]


def scales(keys: Iterable[str]) -> list[str]:
    """Returns what of differing configs puts their meta-losses on different scales.

    Args:
      keys: from :func:`differing`.

    Example:
      >>> scales(["meta.estimator.first.std", "meta.estimator.pairs", "tasks.hidden", "tasks.kind"])
      ['meta.estimator.first.std', 'tasks']
    """
    found = set()
    for key in keys:
        found |= {scale for scale in SCALES if f"{key}.".startswith(f"{scale}.")}
        parts = key.split(".")
        if parts[:2] == ["meta", "estimator"]:
            ends = [end for end, part in enumerate(parts, 1) if part in OF_ESTIMATOR]
            found |= {".".join(parts[: ends[0]])} if ends else set()
    return sorted(found)


def _suite(grid: Grid) -> dict[str, Any] | None:
    if not grid.suite:
        if grid.suite_overrides:
            raise UserError(f"the grid {grid.name} has suite_overrides and no suite")
        return None
    settings = dataclasses.asdict(load_suite(grid.suite, grid.suite_overrides))
    found = {"source": grid.suite, "overrides": list(grid.suite_overrides), "settings": settings}
    return json.loads(json.dumps(found))


def _refuse_twins(cells: Iterable[Cell]) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        other = seen.setdefault(cell.id, cell)
        if other is not cell:
            raise UserError(
                f"cells {other.name!r} and {cell.name!r} have the same config (of run.*, only run.iterations "
                "tells cells apart); take one of them out, or skip it"
            )
