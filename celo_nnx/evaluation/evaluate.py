"""Evaluation of optimizers on a suite, cell by cell, into a folder that resumes.

A folder holds::

    evaluation.json    the suite, the optimizers and what was skipped
    cells.jsonl        a line for each optimizer tuned on a task, with config, versions and cost
    curves-*.npz       the curves of a cell's runs
    lock               held by the one process that writes here

A cell that is there is not computed again, so the same command goes on after any interruption, and a command
with more optimizers adds theirs. Nothing is random but by the seeds, so a cell does not depend on the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from celo_nnx import lock
from celo_nnx.devices import choose_devices, cores
from celo_nnx.errors import MissingData, UserError
from celo_nnx.evaluation.cells import Cell, Cells, Key, digest
from celo_nnx.evaluation.contenders import ADAM, Contender, contenders
from celo_nnx.evaluation.curves import HeldOut, tune
from celo_nnx.evaluation.page import number
from celo_nnx.evaluation.progress import Progress
from celo_nnx.evaluation.report import versions
from celo_nnx.evaluation.results import FILE_NAME, Evaluation, read_evaluation, write_evaluation
from celo_nnx.evaluation.scores import adam_steps
from celo_nnx.evaluation.suites import Suite, task_family
from celo_nnx.evaluation.tuning import Grid, search
from celo_nnx.files import told
from celo_nnx.interfaces import Family
from celo_nnx.meta.checkpoint import data_digest

DEFAULT = (ADAM, "muon", "celo2")  # optimizers
AROUND = 1  # half-decades on either side of Adam's best rate that other lengths are tuned over, and widened


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of :func:`evaluate` ended.

    Attributes:
      folder: where the results are.
      cells: how many the evaluation has.
      computed: how many of them this call has computed.
      skipped: why a task was left out, by its name.
      seconds: wall-clock time of this call.
    """

    folder: Path
    cells: int
    computed: int
    skipped: dict[str, str]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """One cell to be: an optimizer on a task for a number of steps, and what identifies it."""

    task: str
    contender: Contender
    steps: int
    config: dict[str, Any]
    key: Key


def evaluate(
    suite: Suite,
    optimizers: Sequence[str] = DEFAULT,
    *,
    weights: Sequence[str] = (),
    folder: Path | str,
    data_dir: str = "",
    skip_missing: bool = False,
    command: str = "",
) -> Outcome:
    """Tunes and trains every optimizer on every task of a suite; Adam is always among them.

    Args:
      suite: tasks, steps, seeds.
      optimizers, weights: as :func:`celo_nnx.evaluation.contenders.contenders` takes them.
      folder: made where it is missing, gone on with where it is one of the same suite.
      data_dir: a folder of data files, looked up first; empty for none.
      skip_missing: leave tasks out whose data are absent, and say so, instead of refusing to start.
      command: the command line that goes on with this evaluation, for its report.

    Returns:
      What was done.

    Raises:
      UserError: an unknown optimizer, missing weights or data, or a folder that holds something else.

    Example:
      >>> evaluate(load_suite("smoke"), ["adam", "muon"], folder="runs/smoke")  # doctest: +SKIP
    """
    begin, folder = time.monotonic(), Path(folder)
    with told(folder):
        _refuse_foreign(folder)
    # Runs are spread over as many host devices as there are cores; JAX must know before its first use.
    choose_devices(0, cores())
    found = contenders(optimizers, weights, suite.schedule)
    data, skipped = _read_all(suite, data_dir, skip_missing)
    plans = [p for task in data for p in _plans(suite, task, data[task], found)]
    with told(folder), _held(folder):
        note = _note(folder, suite, found, skipped, command)
        cells = Cells(folder)
        _refuse_others(cells, plans)
        write_evaluation(folder, note)
        left = [p for p in plans if p.key not in cells]
        progress = Progress([_work(suite, p) for p in left], len(plans) - len(left))
        with progress:
            for task in dict.fromkeys(p.task for p in left):
                family = task_family(suite, task, data_dir)
                for plan in (p for p in left if p.task == task):
                    progress.start(f"{task}: {plan.contender.label}{_length(suite, plan)}")
                    cell = _compute(suite, plan, family, cells)
                    progress.done(_told_cell(suite, plan, cell, cells))
    return Outcome(folder, len(plans), len(left), skipped, time.monotonic() - begin)


def _read_all(suite: Suite, data_dir: str, skip_missing: bool) -> tuple[dict[str, str], dict[str, str]]:
    """(digests of the data by task, reasons by skipped task); all are read before the first is trained."""
    data, absent = {}, {}
    for task in suite.tasks:
        try:
            data[task] = data_digest(task_family(suite, task, data_dir))
        except MissingData as error:
            absent[task] = str(error).replace("run.data_dir", "--data-dir")
    if absent and not (skip_missing and data):
        names, reason = ", ".join(absent), next(iter(absent.values()))
        hint = " (--skip-missing leaves such tasks out)" if data and not skip_missing else ""
        raise UserError(
            f"data are absent for {len(absent)} of {len(suite.tasks)} tasks, {names}: {reason}{hint}"
        )
    return data, absent


def _plans(suite: Suite, task: str, data: str, found: Sequence[Contender]) -> Iterator[Plan]:
    """The cells of a task: each optimizer at K steps, and Adam at the lengths of its envelope, K first."""
    for contender in found:
        lengths = (suite.steps,)
        if contender.label == ADAM:
            lengths = adam_steps(suite.schedule, suite.steps)
        for steps in lengths:
            config = {
                "task": suite.tasks[task],
                "data": data,
                "optimizer": contender.config,
                "evaluations": suite.evaluations,
                "batches": suite.batches,
                **({"suite_file": suite.file} if suite.file else {}),
            }
            seeds = tuple(range(suite.seeds))
            key = Key(task, contender.label, suite.schedule, steps, seeds, digest(config))
            yield Plan(task, contender, steps, config, key)


def _compute(suite: Suite, plan: Plan, family: Family, cells: Cells) -> Cell:
    """Computes a cell and writes it."""
    begin, contender = time.monotonic(), plan.contender
    options: dict[str, Any] = dict(grid=contender.grid, limit=contender.limit)
    if plan.steps == suite.steps:
        sets = {name: getattr(family, name) for name in ("validation", "test") if getattr(family, name)}
        options["held_out"] = HeldOut(sets, suite.steps // suite.evaluations, suite.batches)
    else:
        options["grid"] = _around(cells[dataclasses.replace(plan.key, steps=suite.steps)])
    grid = search(
        contender.rule(suite.schedule, plan.steps),
        family.task,
        family.train,
        seeds=plan.key.seeds,
        steps=plan.steps,
        context=contender.context,
        eval_params=contender.eval_params,
        **options,
    )
    cell = Cell(
        task=plan.task,
        optimizer=contender.label,
        schedule=suite.schedule,
        steps=plan.steps,
        seeds=plan.key.seeds,
        learning_rates=tuple(float(rate) for rate in grid.learning_rates),
        training=grid.training.best,
        validation=None if grid.validation is None else grid.validation.best,
        warnings=_warnings(grid),
        floor=None if family.task.floor is None else float(family.task.floor),
        measured=_measured(suite, plan, family, grid) | {"seconds": time.monotonic() - begin},
        config=plan.config,
        versions=dict(versions()),
    )
    return cells.add(cell, grid.curves)


def _around(cell: Cell) -> tuple[int, int]:
    """The grid of other lengths: a few half-decades around the best rate for K."""
    best = round(2 * math.log10(cell.learning_rates[cell.training]))
    return best - AROUND, best + AROUND


def _warnings(grid: Grid) -> tuple[str, ...]:
    """What is wrong with the choices."""
    by_validation = grid.validation.warning if grid.validation else ""
    found = [grid.training.warning]
    if by_validation != grid.training.warning:
        found.append(by_validation and f"by validation loss: {by_validation}")
    return tuple(text for text in found if text)


def _measured(suite: Suite, plan: Plan, family: Family, grid: Grid) -> dict[str, float]:
    """Seconds and bytes; see :class:`~celo_nnx.evaluation.curves.Cost`."""
    rule = plan.contender.rule(suite.schedule, plan.steps)

    def start(context: Any) -> tuple[Any, Any]:
        task = family.task
        params, _ = task.init(jax.random.key(0), task.sample(jax.random.key(1)))
        return params, rule(1.0, *context).init(params)

    params, state = jax.eval_shape(start, plan.contender.context)
    cost = grid.curves.cost
    return {
        "compile_seconds": cost.compile_seconds,
        "run_seconds": cost.run_seconds,
        "step_seconds": cost.step_seconds,
        "temp_bytes": cost.temp_bytes,
        "state_bytes": float(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))),
        "parameters": float(sum(x.size for x in jax.tree.leaves(params))),
    }


def _note(
    folder: Path, suite: Suite, found: Sequence[Contender], skipped: Mapping[str, str], command: str
) -> Evaluation:
    """What ``evaluation.json`` is to say: refuses another suite's folder, keeps its older optimizers."""
    mine = dataclasses.asdict(suite) | {"seeds": list(range(suite.seeds))}
    del mine["file"]
    mine = json.loads(json.dumps(mine))
    optimizers = {c.label: {"label": c.label, "about": c.about} for c in found}
    if (folder / FILE_NAME).exists():
        before = read_evaluation(folder)
        _refuse_suite(folder, mine, before.suite)
        optimizers = {o["label"]: o for o in before.optimizers} | optimizers
    return Evaluation(mine, tuple(optimizers.values()), dict(skipped), command)


def _refuse_suite(folder: Path, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raises a :class:`UserError` that names what differs between two suites."""
    plain = [key for key in mine if key != "tasks" and mine[key] != theirs[key]]
    differ = [f"{key} = {mine[key]!r} here, {theirs[key]!r} there" for key in plain]
    names = sorted({*mine["tasks"], *theirs["tasks"]})
    differ += [f"tasks.{n}" for n in names if mine["tasks"].get(n) != theirs["tasks"].get(n)]
    if differ:
        raise UserError(f"{folder} is of another suite: {'; '.join(differ)}; name another --run-dir")


def _refuse_others(cells: Cells, plans: Sequence[Plan]) -> None:
    """Raises a :class:`UserError` where a cell is there that something else has decided."""
    there = {(c.task, c.optimizer, c.steps): c for c in cells}
    for plan in plans:
        cell = there.get((plan.task, plan.contender.label, plan.steps))
        if cell is not None and cell.key != plan.key:
            mine = json.loads(json.dumps(plan.config))
            what = [name for name in mine if mine[name] != cell.config.get(name)]
            raise UserError(
                f"{cells.path}: {plan.contender.label} on {plan.task} is there with another "
                f"{' and '.join(what) or 'plan'}; name another --run-dir, or another label, LABEL=PATH"
            )


def _refuse_foreign(folder: Path) -> None:
    """Raises a :class:`UserError` where something else than an evaluation is there."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name another --run-dir")
    others = sorted(p.name for p in folder.iterdir() if p.name != lock.LOCK_NAME) if folder.exists() else []
    if others and FILE_NAME not in others:
        raise UserError(
            f"{folder} holds {others[0]!r} and no {FILE_NAME}: name a new --run-dir, so that nothing is "
            "overwritten"
        )


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other processes out."""
    folder.mkdir(parents=True, exist_ok=True)
    with lock.hold(folder):
        yield


def _work(suite: Suite, plan: Plan) -> float:
    """How long a cell takes, in steps of runs."""
    first, last = plan.contender.grid if plan.steps == suite.steps else (-AROUND, AROUND)
    return (last - first + 1) * suite.seeds * plan.steps


def _length(suite: Suite, plan: Plan) -> str:
    times = plan.steps / suite.steps
    return f" ({times:.3g} times the steps)" if plan.steps != suite.steps else ""


def _told_cell(suite: Suite, plan: Plan, cell: Cell, cells: Cells) -> str:
    """A line about a finished cell."""
    loss = tune(cells.curves(cell).losses, cell.learning_rates).median
    rate = cell.learning_rates[cell.training]
    text = f"{plan.task}: {cell.optimizer}{_length(suite, plan)}  loss {number(loss)} at rate {rate:.2g}"
    text += f"  {cell.measured['seconds']:.1f} s"
    return text + "".join(f"  ({warning})" for warning in cell.warnings)
