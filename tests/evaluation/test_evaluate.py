"""The command evaluate: what it computes, that it resumes, and what it refuses."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from celo_nnx import lock
from celo_nnx.cli import main
from celo_nnx.errors import UserError
from celo_nnx.evaluation import evaluate as module
from celo_nnx.evaluation.baselines import Rule
from celo_nnx.evaluation.cells import Cells
from celo_nnx.evaluation.contenders import baseline
from celo_nnx.evaluation.curves import train_runs
from celo_nnx.evaluation.evaluate import evaluate
from celo_nnx.evaluation.results import load_results, read_evaluation
from celo_nnx.evaluation.scores import LENGTHS
from celo_nnx.evaluation.suites import load_suite, task_family

SUITE = '''
"""Two quadratics."""

from ml_collections import ConfigDict


def get_config():
    bowl = dict(kind="quadratic", eigenvalues=(1.0, 0.1), columns=3, rotated=False)
    tasks = dict(bowl=bowl, noisy=dict(bowl, noise=0.1))
    return ConfigDict(dict(steps=20, schedule="constant", seeds=2, evaluations=2, batches=1, tasks=tasks))
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("suite") / "bowls.py"
    path.write_text(SUITE)
    return str(path)


@pytest.fixture(scope="module")
def done(file, tmp_path_factory) -> Path:
    """An evaluation of Adam and SGD."""
    folder = tmp_path_factory.mktemp("evaluation") / "done"
    outcome = evaluate(load_suite(file), ["sgd"], folder=folder)
    assert (outcome.cells, outcome.computed, outcome.skipped) == (6, 6, {})
    return folder


def test_cells_hold_each_optimizer_on_each_task_and_adam_beyond(done, file):
    cells = {(c.task, c.optimizer, c.steps): c for c in Cells(done)}
    expected = {("adam", 20), ("adam", 80), ("sgd", 20)}
    assert set(cells) == {(task, *pair) for task in ("bowl", "noisy") for pair in expected}
    evaluation = read_evaluation(done)
    assert evaluation.labels == ("adam", "sgd") and evaluation.suite["seeds"] == [0, 1]
    cell = cells["noisy", "sgd", 20]
    curves = Cells(done).curves(cell)
    suite = load_suite(file)
    family = task_family(suite, "noisy")
    rate = cell.learning_rates[cell.training]
    again = train_runs(
        Rule("sgd", "constant", 20), family.task, family.train, learning_rates=[rate], seeds=[0, 1], steps=20
    )
    np.testing.assert_allclose(curves.losses[cell.training], again.losses[0], rtol=1e-5)
    assert curves.held_out["test"].shape == (len(cell.learning_rates), 2, 2)


def test_longer_runs_are_tuned_around_the_best_of_the_shorter(done):
    cells = {(c.task, c.optimizer, c.steps): c for c in Cells(done)}
    short, long = cells["noisy", "adam", 20], cells["noisy", "adam", 80]
    best = math.log10(short.learning_rates[short.training])
    tried = np.log10(long.learning_rates)
    assert np.any(np.isclose(tried, best)) and len(tried) < len(short.learning_rates)
    # Constant rates: a longer run begins as the shorter one does.
    i = int(np.argmin(abs(np.log10(short.learning_rates) - best)))
    j = int(np.argmin(abs(tried - best)))
    both = [Cells(done).curves(cell).losses for cell in (short, long)]
    np.testing.assert_allclose(both[0][i], both[1][j][:, :20], rtol=1e-4)


def test_costs_are_counted(done):
    for cell in Cells(done):
        assert cell.measured["parameters"] == 6
        # Adam: two moments and a counter; SGD keeps nothing.
        assert cell.measured["state_bytes"] == (2 * 6 * 4 + 4 if cell.optimizer == "adam" else 0)
        assert 0 < cell.measured["run_seconds"] < cell.measured["seconds"]
        assert cell.measured["step_seconds"] > 0 and cell.measured["temp_bytes"] >= 0


def test_the_same_command_computes_nothing_and_others_add(done, file, tmp_path):
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-r", done, folder], check=True)
    before = (folder / "cells.jsonl").read_bytes()
    outcome = evaluate(load_suite(file), ["sgd"], folder=folder)
    assert outcome.computed == 0 and (folder / "cells.jsonl").read_bytes() == before
    outcome = evaluate(load_suite(file), ["lion"], folder=folder)
    assert (outcome.cells, outcome.computed) == (6, 2)
    assert (folder / "cells.jsonl").read_bytes().startswith(before)
    assert read_evaluation(folder).labels == ("adam", "sgd", "lion")


def test_a_schedule_that_ends_with_the_run_has_adam_runs_of_each_length(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(LENGTHS, "cosine", (0.25, 2**-0.5, 1, 4))  # for less to compile
    (tmp_path / "one.py").write_text(SUITE.replace(", noisy=dict(bowl, noise=0.1)", ""))
    suite = load_suite(str(tmp_path / "one.py"), ["schedule=cosine"])
    evaluate(suite, ["adam"], folder=tmp_path / "cosine")
    told = capsys.readouterr().err
    cells = {cell.steps: cell for cell in Cells(tmp_path / "cosine")}
    # K comes first: the others' rates are tried around its best.
    assert list(cells) == [20, 5, 14, 80]
    best = cells[20].learning_rates[cells[20].training]
    assert all(np.isclose(cell.learning_rates, best).any() for cell in cells.values())
    for words in ("bowl: adam  loss", *(f"bowl: adam ({n} times the steps)  loss" for n in (0.25, 0.7, 4))):
        assert told.count(words) == 1, told
    assert load_results(tmp_path / "cosine").missing() == {}


def test_killed_with_9_it_goes_on_without_a_repeated_cell(done, file, tmp_path):
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "celo_nnx", "evaluate", file, "--optimizers", "adam"]
    command += ["--run-dir", str(folder)]
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    cells = folder / "cells.jsonl"
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        deadline = time.monotonic() + 120
        while not (cells.exists() and cells.read_bytes().count(b"\n") >= 2) and time.monotonic() < deadline:
            assert child.poll() is None, child.stderr.read()
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
    before = cells.read_bytes()
    with open(cells, "ab") as torn:
        torn.write(b'{"task": "no')
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    row = json.loads(ran.stdout)
    found = before.count(b"\n")
    assert 2 <= found < 4 and row["cells"] == 4 and row["computed"] == 4 - found
    after = cells.read_bytes()
    assert after.startswith(before) and len(after.splitlines()) == 4
    lines = [line for line in ran.stderr.splitlines() if line.startswith("[")]
    assert len(lines) == 4 - found and lines[-1].startswith("[4/4] noisy: adam (4 times"), ran.stderr
    whole = {cell.key: cell for cell in Cells(done)}
    for cell in Cells(folder):  # two devices here, one there
        mine, theirs = Cells(folder).curves(cell), Cells(done).curves(whole[cell.key])
        np.testing.assert_allclose(mine.losses, theirs.losses, rtol=1e-4)


def test_missing_data_are_named_and_skipped_only_on_request(tmp_path, monkeypatch):
    lm = 'noisy=dict(kind="recurrent_lm", datasets=("shakespeare",))'
    (tmp_path / "more.py").write_text(SUITE.replace("noisy=dict(bowl, noise=0.1)", lm))
    suite = load_suite(str(tmp_path / "more.py"))
    with pytest.raises(
        UserError,
        match="1 of 2 tasks, noisy: .*'shakespeare' not.*--data-dir.*--skip-missing",
    ):
        evaluate(suite, ["adam"], folder=tmp_path / "a")
    assert not (tmp_path / "a").exists()
    monkeypatch.setitem(LENGTHS, "constant", (1,))  # for less to compile
    outcome = evaluate(suite, ["adam"], folder=tmp_path / "a", skip_missing=True)
    assert list(outcome.skipped) == ["noisy"] and outcome.cells == 1
    evaluation = read_evaluation(tmp_path / "a")
    assert evaluation.tasks == ("bowl",) and "shakespeare" in evaluation.skipped["noisy"]


def test_a_folder_of_something_else_is_left_alone(done, file, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"another suite: steps = 40 here, 20 there; name another --run-dir"):
        evaluate(load_suite(file, ["steps=40"]), ["sgd"], folder=done)
    with pytest.raises(UserError, match=r"another suite: tasks.bowl; name"):
        evaluate(load_suite(file, ["tasks.bowl.columns=2"]), ["sgd"], folder=done)
    with lock.hold(done), pytest.raises(UserError, match="in use by pid"):
        evaluate(load_suite(file), ["sgd"], folder=done)
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr(module, "contenders", lambda *_: pytest.fail("built before the folder is looked at"))
    with pytest.raises(UserError, match=r"holds 'notes.txt' and no evaluation.json"):
        evaluate(load_suite(file), ["sgd"], folder=tmp_path)
    with pytest.raises(UserError, match="is a file"):
        evaluate(load_suite(file), ["sgd"], folder=tmp_path / "notes.txt")


def test_a_label_stands_for_one_optimizer(done, file, monkeypatch):
    other = dataclasses.replace(baseline("sgd"), config={"baseline": "sgd", "about": "with momentum"})
    monkeypatch.setattr(module, "contenders", lambda *_: [baseline("adam"), other])
    with pytest.raises(
        UserError,
        match=r"sgd on bowl is there with another optimizer; name another",
    ):
        evaluate(load_suite(file), ["sgd"], folder=done)


def test_a_changed_suite_file_is_another_suite(done, tmp_path):
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-r", done, folder], check=True)
    (tmp_path / "bowls.py").write_text(SUITE + "\n# changed\n")
    before = (folder / "evaluation.json").read_bytes()
    with pytest.raises(UserError, match="adam on bowl is there with another suite_file"):
        evaluate(load_suite(str(tmp_path / "bowls.py")), ["sgd", "lion"], folder=folder)
    assert (folder / "evaluation.json").read_bytes() == before, "a refused command changes nothing"


def test_an_optimizer_of_ones_own(done, file, tmp_path):
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-r", done, folder], check=True)
    own = tmp_path / "own.py"
    own.write_text("import optax\ndef get_optimizer(learning_rate):\n    return optax.sgd(learning_rate)\n")
    assert evaluate(load_suite(file), ["sgd", str(own)], folder=folder).computed == 2
    mine, theirs = (
        next(c for c in Cells(folder) if (c.task, c.optimizer) == ("bowl", name)) for name in ("own", "sgd")
    )
    i, j = (c.learning_rates.index(min(c.learning_rates, key=lambda r: abs(r - 0.1))) for c in (mine, theirs))
    losses = Cells(folder).curves(mine).losses[i], Cells(folder).curves(theirs).losses[j]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    own.write_text(own.read_text().replace("sgd", "lion"))
    with pytest.raises(UserError, match="own on bowl is there with another optimizer"):
        evaluate(load_suite(file), [str(own)], folder=folder)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["smok"], "unknown suite 'smok' (did you mean 'smoke'?)"),
        (["smoke", "--seeds", "0"], "seeds = 0 is out of range"),
        (["smoke", "--optimizers", "adam,munon"], "did you mean 'muon'"),
        (["smoke", "step=4"], "step"),
        (["smoke", "--optimizers", "sgd", "steps=0"], "steps = 0 is out of range"),
        (["smoke", "--optimizers", "absent.py"], "no file absent.py"),
        (["smoke", "--optimizers", "sgd=x.py"], "'sgd' is an optimizer of its own"),
        (["celo17_local"], "data are absent for"),
        (["smoke", "--optimizers", "celo2", "--weights", "no.safetensors"], "no weights at no.safetensors"),
        (["smoke", "--optimizers", "adam", "--data-dir", "nodir"], ": --data-dir = 'nodir' is not a folder"),
        (["celo2"], "not a suite"),
    ],
)
def test_mistakes_on_the_command_line(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *argv]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())
