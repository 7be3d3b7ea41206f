"""Aggregates of a whole evaluation against the package rliable, where an interpreter that has it is named."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from pathlib import Path

import made_evaluation as made
import pytest

from celo_nnx.evaluation import suite_csv
from celo_nnx.evaluation.cells import Cells
from celo_nnx.evaluation.results import Evaluation, load_results, write_evaluation
from celo_nnx.evaluation.standings import standings

INTERPRETER = "CELO_NNX_RLIABLE_PYTHON"
SEEDS = tuple(range(5))


def noisy_folder(folder: Path) -> Path:
    """Three optimizers, six tasks, five seeds that differ a lot, a diverged run."""
    tasks, labels = [f"t{i}" for i in range(6)], ("adam", "one", "two")
    plan = made.suite(tasks, seeds=list(SEEDS))
    write_evaluation(folder, Evaluation(plan, tuple({"label": label, "about": ""} for label in labels)))
    cells = Cells(folder)
    for k, task in enumerate(tasks):
        for i, label, steps in ((0, "adam", 200), (0, "adam", 800), (1, "one", 200), (2, "two", 200)):

            def curve(at, rate, seed, k=k, i=i):
                low = 0.3 * (1 + 0.15 * ((7 * seed + 3 * k + 5 * i) % 11) / 11 - 0.02 * i * (k - 2))
                return made.noisy(at, rate, 100 * k + 10 * i + seed, low=low)

            losses = made.grid(curve, steps, seeds=SEEDS)
            if (label, k) == ("two", 3):
                losses[:, 1, 60:] = float("inf")
            made.add(cells, task, label, losses, seeds=SEEDS)
    return folder


def test_rliable_agrees(tmp_path: Path) -> None:
    python = os.environ.get(INTERPRETER)
    if not python:
        pytest.skip(f"{INTERPRETER} names no interpreter that has the package rliable")
    results = load_results(noisy_folder(tmp_path / "a"))
    ranking = standings(results)
    path = tmp_path / "scores.csv"
    path.write_text(suite_csv.runs(results))
    summary = csv.DictReader(suite_csv.optimizers(results, ranking).splitlines())
    script = Path(__file__).with_name("rliable_check.py")
    done = subprocess.run([python, "-W", "ignore", str(script), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    worst, compared = 0.0, 0
    for row in summary:
        for name, (value, low, high) in theirs[row["optimizer"]].items():
            mine = [float(row[f"{name}{end}"]) for end in ("", "_low", "_high")]
            assert mine[0] == pytest.approx(value, abs=1e-6), (row["optimizer"], name)
            # Ends of 2000 samples have a standard error of 1.5 % of a normal interval's width.
            width = max(high - low, 1e-6)
            worst = max(worst, abs(mine[1] - low) / width, abs(mine[2] - high) / width)
            compared += 1
            print(row["optimizer"], name, mine, [value, low, high])
            assert mine[1:] == pytest.approx([low, high], abs=0.08 * width), (row["optimizer"], name)
    assert compared == 3 * 6 + 2
    print(f"{compared} aggregates; ends differ by {worst:.3f} widths at most")
