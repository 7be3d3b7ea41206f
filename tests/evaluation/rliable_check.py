"""What the package rliable makes of a ``scores.csv``, as JSON. Run by an interpreter that has rliable.

python rliable_check.py scores.csv [resamples]
"""

from __future__ import annotations

import csv
import json
import sys

import numpy as np
from rliable import library, metrics

STATISTICS = {
    "iqm": metrics.aggregate_iqm,
    "median": metrics.aggregate_median,
    "mean": metrics.aggregate_mean,
}


def matrix(rows: list[dict[str, str]], optimizer: str, column: str) -> np.ndarray:
    """Scores of one optimizer, ``[n_seeds, n_tasks]``."""
    own = [row for row in rows if row["optimizer"] == optimizer]
    tasks = list(dict.fromkeys(row["task"] for row in own))
    return np.array([[float(row[column]) for row in own if row["task"] == task] for task in tasks]).T


def main(path: str, resamples: int) -> None:
    """Prints value, lower and upper end by name as ``summary.csv`` has them, for every optimizer."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    names = list(dict.fromkeys(row["optimizer"] for row in rows))
    found: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for column in ("score", "speedup"):
        scores = {name: matrix(rows, name, column) for name in names}
        for statistic, function in STATISTICS.items():
            values, ends = library.get_interval_estimates(
                scores, lambda x, f=function: np.array([f(x)]), reps=resamples
            )
            for name in names:
                found[name][f"{column}_{statistic}"] = [float(values[name][0]), *map(float, ends[name][:, 0])]
    scores = {name: matrix(rows, name, "score") for name in names}
    pairs = {name: (scores[name], scores["adam"]) for name in names if name != "adam"}
    values, ends = library.get_interval_estimates(
        pairs, metrics.probability_of_improvement, reps=min(resamples, 2000)
    )
    for name in pairs:
        found[name]["improvement_over_adam"] = [float(values[name]), *np.ravel(ends[name]).tolist()]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 10_000)
