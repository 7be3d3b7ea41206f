"""The numbers of a study as CSV files and a table, and its picture."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from celo_nnx.evaluation.plots import (
    fit_y,
    label_axes,
    legend_above,
    plain_numbers,
    positive,
    style,
    to_svg,
)
from celo_nnx.experiments.training.loop import OPTIMIZERS, Plan, Run
from celo_nnx.experiments.training.study import Job
from celo_nnx.grids.effects import half_width


@dataclasses.dataclass(frozen=True)
class Row:
    """An optimizer's result.

    Attributes:
      optimizer, learning_rate: what was run.
      seeds: how many runs.
      loss: the mean final validation loss; infinite where a run diverged.
      half_width: of Student's 95 % interval of the mean; NaN for one seed.
      milliseconds: a step takes, the median run.
    """

    optimizer: str
    learning_rate: float
    seeds: int
    loss: float
    half_width: float
    milliseconds: float


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean loss of one optimizer less another's, paired by seed, and half of its 95 % interval."""

    optimizer: str
    less: str
    loss: float
    half_width: float


def rows(results: dict[Job, Run], plan: Plan) -> tuple[list[Row], list[Difference]]:
    """Summarizes runs of one problem, whose seeds are the same for every optimizer."""
    found: dict[str, dict[Job, Run]] = {}
    for job, run in results.items():
        found.setdefault(job.optimizer, {})[job] = run
    means, apart, finals = [], [], {}
    for name, runs in found.items():
        losses = np.array([run.final(plan.steps) for run in runs.values()])
        took = 1000 * float(np.median([run.seconds for run in runs.values()]))
        rate = next(iter(runs)).rate
        means.append(Row(name, rate, len(losses), float(losses.mean()), half_width(losses), took))
        for other, theirs in finals.items():
            gap = losses - theirs
            apart.append(Difference(name, other, float(gap.mean()), half_width(gap)))
        finals[name] = losses
    return means, apart


def write(
    name: str, tuned: dict[str, dict[int, Run]], results: dict[Job, Run], plan: Plan, folder: Path
) -> None:
    """Writes tables of curves, rates, means and differences and ``NAME.svg``, and prints the last two."""
    found, apart = rows(results, plan)
    curves = (
        (job.optimizer, f"{job.rate:.4g}", job.seed, step, f"{loss:.5f}", f"{held_out:.5f}")
        for job, run in results.items()
        for step, loss, held_out in run.curve
    )
    heads = ("optimizer", "learning_rate", "seed", "step", "training_loss", "validation_loss")
    write_csv(folder / "curves.csv", heads, curves)
    grid = (
        (optimizer, f"{10 ** (half / 2):.4g}", f"{run.final(plan.steps):.5f}")
        for optimizer, runs in tuned.items()
        for half, run in sorted(runs.items())
    )
    write_csv(folder / "rates.csv", ("optimizer", "learning_rate", "validation_loss"), grid)
    for file, kind, table in (("summary", Row, found), ("differences", Difference, apart)):
        heads = tuple(field.name for field in dataclasses.fields(kind))
        lines = ([_text(value) for value in dataclasses.astuple(row)] for row in table)
        write_csv(folder / f"{file}.csv", heads, lines)
    picture = to_svg(figure(tuned, results, plan), name, standalone=True)
    (folder / f"{name}.svg").write_text(picture, encoding="utf-8")
    print(f"validation loss after {plan.steps} steps, mean over seeds and 95 % interval:")
    for row in found:
        loss = _interval(f"{row.loss:.4f}", row.half_width)
        print(f"  {row.optimizer:<6} lr {row.learning_rate:<8.3g} {loss}  {row.milliseconds:.1f} ms a step")
    for gap in apart:
        print(f"  {gap.optimizer} less {gap.less}: {_interval(f'{gap.loss:+.4f}', gap.half_width)}")
    print(f"picture: {folder / f'{name}.svg'}")


def figure(tuned: dict[str, dict[int, Run]], results: dict[Job, Run], plan: Plan) -> Figure:
    """Validation loss against step, mean and range of the seeds; beside it, final loss against rate."""
    drawn = Figure(figsize=(9.6, 3.9), layout="constrained")
    left, right = drawn.subplots(1, 2, width_ratios=(1.6, 1))
    label_axes(left, "step", "validation loss")
    label_axes(right, "learning rate", "final validation loss, tuning seed")
    shown = []
    for name, runs in tuned.items():
        color, dashes = style(list(OPTIMIZERS).index(name))
        jobs = [job for job in results if job.optimizer == name]
        courses = np.full((len(jobs), plan.steps // plan.every), np.nan)
        for course, job in zip(courses, jobs, strict=True):
            losses = [held_out for _, _, held_out in results[job].curve]
            course[: len(losses)] = positive(np.array(losses))
        steps = plan.every * np.arange(1, courses.shape[1] + 1)
        label = f"{name} (lr {jobs[0].rate:.2g})"
        left.plot(steps, courses.mean(axis=0), color=color, linestyle=dashes, label=label)
        ends = courses.min(axis=0), courses.max(axis=0)
        left.fill_between(steps, *ends, color=color, alpha=0.2, linewidth=0)
        shown.append(courses[np.isfinite(courses)])
        halves = sorted(runs)
        finals = positive(np.array([runs[half].final(plan.steps) for half in halves]))
        points = dict(color=color, linestyle=dashes, marker="o", markersize=4)
        right.plot([10 ** (half / 2) for half in halves], finals, **points)
    fit_y(left, np.concatenate(shown))
    right.set_xscale("log")
    plain_numbers(right.xaxis)
    legend_above(left, 3)
    return drawn


def write_csv(path: Path, heads: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """Writes a table; what a command made earlier is replaced by what it makes of the same runs."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(lines)
    path.write_text(file.getvalue(), encoding="utf-8")


def _interval(value: str, half: float) -> str:
    return f"{value} ± {half:.4f}" if math.isfinite(half) else value


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}" if math.isfinite(value) else ""
    return str(value)
