"""One real cell: a tiny meta-training and its evaluation, stopped between the two."""

import json
import os
import signal
from unittest import mock

import pytest

from celo_nnx.grids import work
from celo_nnx.grids.drive import run
from celo_nnx.grids.grid_file import Grid
from celo_nnx.grids.store import read_grid

SUITE = """
from ml_collections import ConfigDict


def get_config():
    bowl = dict(kind="quadratic", eigenvalues=(1.0, 0.1), columns=3, rotated=False)
    plan = dict(steps=20, schedule="constant", seeds=2, evaluations=2, batches=1)
    return ConfigDict(dict(plan, tasks=dict(bowl=bowl)))
"""
FEW = (
    "meta.estimator.pairs=2",
    "meta.estimator.truncation=2",
    "run.iterations_per_dispatch=2",
    "run.iterations=4",
    "run.devices=1",
    "tasks.hidden=(4,)",
    "tasks.batch_size=4",
    "optimizer.update_rule.hidden=(2,2)",
    "optimizer.features.groups=('gradient','momentum')",
)


def test_a_cell_trains_evaluates_and_goes_on(tmp_path, capsys):
    (tmp_path / "bowls.py").write_text(SUITE)
    grid = Grid(
        name="one",
        question="Does a cell work?",
        base="celo2_base:fast_digits",
        overrides=FEW,
        cells={"small": ()},
        suite=str(tmp_path / "bowls.py"),
        suite_overrides=("steps=10",),
    )
    run(grid, tmp_path / "g", lambda folders, stop, tell: None)
    folder = read_grid(tmp_path / "g").cells[0].folder

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("not reached")

    with mock.patch.object(work, "evaluated", interrupted):
        assert work.run_cell(folder.path) == "stopped"
    assert folder.state() == "stopped" and [row["event"] for row in folder.attempts()] == ["start", "stopped"]
    assert work.run_cell(folder.path) == "done"
    outcome = json.loads((folder.path / "result.json").read_text())["outcome"]
    assert outcome["iterations"] == 4 and outcome["score"] > 0 and outcome["speedup"] > 0
    kept = (folder.path / "result.json").stat().st_mtime_ns
    assert work.run_cell(folder.path) == "done"
    assert (folder.path / "result.json").stat().st_mtime_ns == kept
