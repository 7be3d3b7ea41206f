"""How optimizers stand over the tasks that all of them have finished. Numpy only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from celo_nnx.evaluation import aggregates
from celo_nnx.evaluation.aggregates import Estimate
from celo_nnx.evaluation.results import ADAM, DEVICES, Results, TaskResult


@dataclasses.dataclass(frozen=True)
class Standing:
    """One optimizer over the finished tasks.

    Attributes:
      label: its name in the evaluation.
      about: what it is.
      place: its place in the evaluation's list, which decides its colour.
      runs: over all tasks and seeds.
      diverged: how many of them.
      score: aggregates of the final-loss scores, by name of the statistic.
      speedup: aggregates of the speedups.
      faster: IQM of the speedups less that of Adam's own, which is below 1; None for Adam. Both are against
        the same envelope, so that most of its noise and bias cancel.
      at_least: how many speedups are only lower bounds.
      improvement: probability that a run's final-loss score is above Adam's; None for Adam.
      step_time: of a step, as a multiple of Adam's, median over the tasks on which both ran on the same
        devices; NaN where it was not measured.
      state: bytes of state, as a multiple of Adam's, median over tasks; NaN where it was not measured.
    """

    label: str
    about: str
    place: int
    runs: int
    diverged: int
    score: dict[str, Estimate]
    speedup: dict[str, Estimate]
    faster: Estimate | None
    at_least: int
    improvement: Estimate | None
    step_time: float
    state: float

    @property
    def bounded(self) -> bool:
        """Whether lower bounds enter the IQM of the speedups: they are the largest, so it leaves some out."""
        return self.at_least > self.runs // 4


def standings(results: Results) -> list[Standing]:
    """Aggregates the scores of every optimizer, the best IQM of final-loss scores first.

    Args:
      results: of which the finished tasks count.

    Returns:
      One an optimizer that is not under way; none without Adam or finished tasks.

    Example:
      >>> standings(load_results("runs/smoke"))[0].label  # doctest: +SKIP
      'celo2'
    """
    tasks, behind = results.finished(), results.under_way()
    if not tasks or ADAM not in results.evaluation.labels:
        return []
    adam, own = results.matrix(ADAM, "score"), results.matrix(ADAM, "speedup")
    out = []
    for place, optimizer in enumerate(results.evaluation.optimizers):
        label = optimizer["label"]
        if label in behind:
            continue
        score, speedup = results.matrix(label, "score"), results.matrix(label, "speedup")
        at_least = int(results.matrix(label, "at_least").sum())
        finals = np.stack([task.entries[label].training.final for task in tasks])
        standing = Standing(
            label=label,
            about=optimizer["about"],
            place=place,
            runs=score.size,
            diverged=int((~np.isfinite(finals)).sum()),
            score={name: aggregates.aggregate(score, name) for name in aggregates.STATISTICS},
            speedup={name: aggregates.aggregate(speedup, name) for name in aggregates.STATISTICS},
            faster=None if label == ADAM else aggregates.difference(speedup, own),
            at_least=at_least,
            improvement=None if label == ADAM else aggregates.improvement(score, adam),
            step_time=_relative(
                [task for task in tasks if _same_devices(task, label)], label, "step_seconds"
            ),
            state=_relative(tasks, label, "state_bytes"),
        )
        out.append(standing)
    return sorted(out, key=lambda standing: -standing.score["iqm"].value)


def _same_devices(task: TaskResult, label: str) -> bool:
    own, adam = (task.entries[x].cell.versions.get(DEVICES) for x in (label, ADAM))
    return own == adam


def _relative(tasks: Sequence[TaskResult], label: str, name: str) -> float:
    """The median over tasks of a measurement divided by Adam's; tasks where it lacks are left out."""
    pairs = [[task.entries[x].cell.measured.get(name, -1.0) for x in (label, ADAM)] for task in tasks]
    ratios = [own / adam for own, adam in pairs if own >= 0 and adam > 0]
    return float(np.median(ratios)) if ratios else float("nan")
