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

BASE = "adamw"  # what others are compared with


@dataclasses.dataclass(frozen=True)
class Row:
    """An optimizer's result.

    Attributes:
      optimizer, learning_rate: what was run.
      seeds: how many runs.
      loss: the mean final validation loss; infinite where a run diverged.
      half_width: of Student's 95 % interval of the mean; NaN for one seed.
      difference: mean of the loss less that of :data:`BASE`, paired by seed; NaN without it.
      difference_half_width: of its interval.
      milliseconds: a step takes, the median run.
    """

    optimizer: str
    learning_rate: float
    seeds: int
    loss: float
    half_width: float
    difference: float
    difference_half_width: float
    milliseconds: float


def rows(results: dict[Job, Run], plan: Plan) -> list[Row]:
    """Summarizes runs of one problem, whose seeds are the same for every optimizer."""
    finals, out = {}, []
    for job, run in results.items():
        finals.setdefault(job.optimizer, {})[job.seed] = run.final(plan.steps)
    for name, by_seed in finals.items():
        losses = np.array(list(by_seed.values()))
        other = finals.get(BASE) if name != BASE else None
        apart = losses - np.array([other[seed] for seed in by_seed]) if other else np.array([math.nan])
        runs = {job: run for job, run in results.items() if job.optimizer == name}
        took = 1000 * float(np.median([run.seconds for run in runs.values()]))
        rate, half = next(iter(runs)).rate, half_width(losses)
        spread = half_width(apart) if other else math.nan
        out.append(Row(name, rate, len(losses), losses.mean(), half, apart.mean(), spread, took))
    return out


def write(
    name: str, tuned: dict[str, dict[int, Run]], results: dict[Job, Run], plan: Plan, folder: Path
) -> None:
    """Writes ``curves.csv``, ``rates.csv``, ``summary.csv`` and ``NAME.svg``, and prints the summary."""
    found = rows(results, plan)
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
    heads = tuple(field.name for field in dataclasses.fields(Row))
    write_csv(folder / "summary.csv", heads, ([_text(x) for x in dataclasses.astuple(r)] for r in found))
    picture = to_svg(figure(tuned, results, plan), name, standalone=True)
    (folder / f"{name}.svg").write_text(picture, encoding="utf-8")
    print(f"validation loss after {plan.steps} steps, mean over seeds and 95 % interval:")
    for row in found:
        loss = _interval(f"{row.loss:.4f}", row.half_width)
        apart = _interval(f"{row.difference:+.4f}", row.difference_half_width)
        against = f"  {apart} against {BASE}" if math.isfinite(row.difference) else ""
        rate = f"lr {row.learning_rate:<8.3g}"
        print(f"  {row.optimizer:<6} {rate} {loss}  {row.milliseconds:.1f} ms a step{against}")
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
