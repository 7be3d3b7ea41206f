"""One cell: training and evaluation, stopped between the two; the scores of a real evaluation."""

import os
import shutil
import signal
from pathlib import Path
from unittest import mock

import fake_run
import made_grid
import pytest

from celo_nnx.errors import UserError
from celo_nnx.evaluation import evaluate
from celo_nnx.grids import work
from celo_nnx.grids.drive import run
from celo_nnx.grids.grid_file import load_grid
from celo_nnx.grids.store import CellFolder, read_grid

SUITE = """
from ml_collections import ConfigDict


def get_config():
    bowl = dict(kind="quadratic", eigenvalues=(1.0, 0.1), columns=3, rotated=False)
    plan = dict(steps=20, schedule="constant", seeds=2, evaluations=2, batches=1)
    return ConfigDict(dict(plan, tasks=dict(bowl=bowl)))
"""


@pytest.fixture
def folder(tmp_path) -> CellFolder:
    """A cell that is to be evaluated on a quadratic."""
    (tmp_path / "bowls.py").write_text(SUITE)
    more = f'suite={str(tmp_path / "bowls.py")!r}, suite_overrides=("steps=10",), question='
    file = made_grid.file(tmp_path, made_grid.FILE.replace("question=", more))
    grid = load_grid(file, ["run.checkpoint_seconds=1000.0"])
    run(grid, tmp_path / "g", lambda folders, stop, tell: None)
    return read_grid(tmp_path / "g").cells[0].folder


def test_it_is_trained_and_then_evaluated(folder):
    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("not reached")

    handler = signal.getsignal(signal.SIGTERM)
    with fake_run.assembled():
        with mock.patch.object(work, "evaluated", interrupted):
            assert work.run_cell(folder.path) == "stopped"
        assert folder.state() == "stopped" and signal.getsignal(signal.SIGTERM) is handler
        with mock.patch.object(work, "evaluated", lambda *args: pytest.fail("not reached")):
            assert work.run_cell(folder.path, stop=lambda: 15) == "stopped"
        with mock.patch.object(work, "evaluated", side_effect=UserError("no scores")):
            with pytest.raises(UserError, match="no scores"):
                work.run_cell(folder.path)
        assert folder.state() == "failed" and folder.mistaken()
        with mock.patch.object(work, "evaluated", return_value=({"score": 1.5, "speedup": 2.0}, 3.0)):
            assert work.run_cell(folder.path) == "done"
        result = folder.result()
        assert result["outcome"]["score"] == 1.5 and result["cost"]["evaluation_seconds"] == 3.0
        events = [row["event"] for row in folder.attempts()]
        assert events == ["start", "stopped"] * 2 + ["start", "failed", "start", "done"]
        assert work.run_cell(folder.path) == "done" and folder.starts() == 4


def test_a_full_disk_is_told(folder):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    with fake_run.assembled(), mock.patch.object(work, "write_json", full):
        with mock.patch.object(work, "evaluated", return_value=({"score": 1.5}, 3.0)):
            with pytest.raises(UserError, match="No space left on device"):
                work.run_cell(folder.path)
    assert folder.result() is None


def test_what_may_mend_by_itself_is_no_mistake(folder):
    full = UserError("the run directory cannot be used")
    full.__context__ = OSError(28, "No space left on device")
    for error, mistake in ((full, False), (ValueError("no"), False), (UserError("no"), True)):
        with mock.patch.object(work.training, "train", side_effect=error):
            with pytest.raises(type(error)):
                work.run_cell(folder.path)
        assert folder.failure() and folder.mistaken() is mistake


def test_scores_of_a_trained_theta(folder, real_run):
    shutil.copytree(Path(real_run[0]), folder.run_dir)
    scores, seconds = work.evaluated(folder, folder.read())
    assert scores["score"] > 0 and scores["speedup"] >= 0 and seconds > 0
    # Another cell takes Adam's runs over; the same theta then has the same scores.
    (folder.path / "result.json").write_text('{"outcome": {}}')
    other = read_grid(folder.path.parents[1]).cells[1].folder
    shutil.copytree(Path(real_run[0]), other.run_dir)
    with mock.patch.object(evaluate, "_compute", wraps=evaluate._compute) as compute:
        again, less = work.evaluated(other, other.read())
    assert compute.call_count == 1 and again == scores and less < seconds
    assert [row["cell"] for row in other.attempts()] == [folder.path.name]
