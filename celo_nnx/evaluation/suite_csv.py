"""An evaluation's scores as CSV: a row a run, and a row an optimizer. Numbers are written in full."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from celo_nnx.evaluation.aggregates import STATISTICS, Estimate
from celo_nnx.evaluation.results import Results
from celo_nnx.evaluation.standings import Standing

RUNS = (
    "optimizer",
    "task",
    "seed",
    "learning_rate",
    "final_loss",
    "validation_loss",
    "test_loss",
    "score",
    "speedup",
    "speedup_is_lower_bound",
    "diverged",
)
_ESTIMATES = tuple(f"{kind}_{name}" for kind in ("score", "speedup") for name in STATISTICS)
OPTIMIZERS = (
    "optimizer",
    "tasks",
    "runs",
    "diverged",
    *(f"{name}{end}" for name in _ESTIMATES for end in ("", "_low", "_high")),
    "speedup_iqm_less_adams",
    "speedup_iqm_less_adams_low",
    "speedup_iqm_less_adams_high",
    "speedup_lower_bounds",
    "improvement_over_adam",
    "improvement_over_adam_low",
    "improvement_over_adam_high",
    "step_time_over_adam",
    "state_over_adam",
    "about",
)


def mark(columns: Sequence[str]) -> bytes:
    """What such a file begins with, which tells one of ours; an older one may have fewer columns."""
    return ",".join(columns[:4]).encode()


def runs(results: Results) -> str:
    """The runs at the learning rates that training losses chose: optimizer by task by seed.

    A diverged run's final losses are ``inf``; a score that there is not is empty, and so is a held-out loss
    where the task has no such set.
    """
    rows = []
    for label in results.evaluation.labels:
        for task in results.tasks:
            entry = task.entries.get(label)
            if entry is None:
                continue
            held_out = (entry.training.held_out.get(name) for name in ("validation", "test"))
            columns = (*held_out, entry.score, entry.speedup, entry.at_least)
            for i, seed in enumerate(entry.cell.seeds):
                final = float(entry.training.final[i])
                row = [label, task.name, seed, entry.training.learning_rate, final]
                row += [None if c is None else c[i].item() for c in columns]
                rows.append([*row, not np.isfinite(final)])
    return _text(RUNS, rows)


def optimizers(results: Results, ranking: Sequence[Standing]) -> str:
    """The aggregates over the finished tasks, in the order of the evaluation's list."""
    count, rows = len(results.finished()), []
    for standing in sorted(ranking, key=lambda standing: standing.place):
        row: list[Any] = [standing.label, count, standing.runs, standing.diverged]
        for kind in (standing.score, standing.speedup):
            for name in STATISTICS:
                row += _three(kind[name])
        row += [*_three(standing.faster), standing.at_least, *_three(standing.improvement)]
        row += [standing.step_time, standing.state]
        rows.append([*(None if x != x else x for x in row), standing.about])
    return _text(OPTIMIZERS, rows)


def _three(estimate: Estimate | None) -> list[Any]:
    return [None] * 3 if estimate is None else [estimate.value, estimate.low, estimate.high]


def _text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return file.getvalue()
