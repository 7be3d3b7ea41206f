"""The quickstart's pieces at tiny sizes; meta-training is a stand-in child that logs, saves and resumes."""

import json
import os
import sys

import jax
import numpy as np
import pytest

from celo_nnx import quickstart, theta_io
from celo_nnx.build import build
from celo_nnx.config import load
from celo_nnx.errors import UserError
from celo_nnx.quickstart import Course, Narrator, Settings

# Logs an iteration every 20 ms; saves every tenth; resumes from the save and trims the log to it.
CHILD = """
import json, os, pathlib, signal, sys, time
folder, total = pathlib.Path(sys.argv[1]), int(sys.argv[2])
folder.mkdir(exist_ok=True)
log, saved = folder / "metrics.jsonl", folder / "theta.safetensors"
stop = []
signal.signal(signal.SIGINT, lambda *_: stop.append(1))
start = int(saved.read_text()) if saved.exists() else 0
lines = log.read_text().splitlines()[:start] if log.exists() else []
log.write_text("".join(line + "\\n" for line in lines))
time.sleep(0.6)
for i in range(start + 1, total + 1):
    with open(log, "a") as file:
        loss = 1.0 / i if i != 3 else None
        file.write(json.dumps({"iteration": i, "loss": loss, "pid": os.getpid()}) + "\\n")
    if i % 10 == 0:
        part = folder / "part"
        part.write_text(str(i))
        part.replace(saved)
    if stop:
        sys.exit(130)
    time.sleep(0.02)
"""


@pytest.fixture
def child(monkeypatch):
    def command(settings, run_dir):
        return [sys.executable, "-c", CHILD, str(run_dir), str(settings.iterations)]

    monkeypatch.setattr(quickstart, "train_command", command)
    monkeypatch.setattr(quickstart, "POLL_SECONDS", 0.02)


def test_meta_training_is_killed_half_way_and_resumes(child, tmp_path, capsys):
    course = quickstart.meta_train(Settings(iterations=60), tmp_path, Narrator())
    assert [record["iteration"] for record in course.records] == list(range(1, 61))
    [(killed, words)] = course.events
    assert 30 <= killed < 60
    resumed = int(words.split()[-1])
    assert resumed % 10 == 0 and killed - 12 <= resumed <= killed
    pids = [record["pid"] for record in course.records]
    assert len(set(pids)) == 2 and pids.index(pids[-1]) == resumed
    assert "kill -9" in capsys.readouterr().out


def test_meta_training_stops_at_the_time_limit(child, tmp_path, capsys):
    course = quickstart.meta_train(Settings(iterations=100_000, seconds=3.0), tmp_path, Narrator())
    assert 10 < course.records[-1]["iteration"] < 1000 and len(course.events) == 1
    assert "SIGINT" in capsys.readouterr().out


def test_a_failing_child_is_told_in_one_line(monkeypatch, tmp_path):
    failing = [sys.executable, "-c", "import sys; print('celo-nnx: error: no such thing'); sys.exit(2)"]
    monkeypatch.setattr(quickstart, "train_command", lambda *_: failing)
    with pytest.raises(UserError, match="exit code 2: celo-nnx: error: no such thing") as caught:
        quickstart.meta_train(Settings(), tmp_path, Narrator())
    assert "\n" not in str(caught.value)


def test_the_child_does_not_outlive_an_interrupt(child, tmp_path, monkeypatch):
    def interrupt(self, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(Narrator, "progress", interrupt)
    seen = []
    monkeypatch.setattr(quickstart.subprocess, "Popen", _recording(quickstart.subprocess.Popen, seen))
    with pytest.raises(KeyboardInterrupt):
        quickstart.meta_train(Settings(), tmp_path, Narrator())
    assert len(seen) == 1 and seen[0].returncode is not None


def _recording(popen, seen):
    def start(*args, **kwargs):
        seen.append(popen(*args, **kwargs))
        return seen[-1]

    return start


def test_comparison_and_files(tmp_path, capsys):
    settings = Settings(hidden=(), steps=4, seeds=(0, 1), learning_rates=(1e-3, 1e-2, 1e-1), iterations=3)
    config = load(settings.config, settings.overrides)
    start = build(config.optimizer, theta_init=config.theta_init)
    (tmp_path / "meta").mkdir()
    theta_io.save_theta(tmp_path / "meta" / "theta.safetensors", start.theta)
    records = [{"iteration": i, "loss": loss} for i, loss in enumerate([2.0, None, 1.5], 1)]
    course = Course(records, ((2, "kill -9 here; resumed by itself from iteration 1"),), 1.0)
    path = quickstart._write(settings, tmp_path, course, Narrator())
    assert path == tmp_path / "report.html"
    text = path.read_text("utf-8")
    for words in (
        "Celo2, meta-trained here",
        "Adam",
        "resumed by itself",
        "hidden layers none (tanh)",
        "momentum",
    ):
        assert words in text
    rows = json.loads((tmp_path / "results.json").read_text("utf-8"))
    medians = [np.inf if row["median"] is None else row["median"] for row in rows]
    assert len(rows) == 4 and medians == sorted(medians)
    assert all(len(row["seeds"]) == 2 for row in rows)
    assert os.path.getsize(tmp_path / "curves.svg") < 120_000
    out = capsys.readouterr().out
    assert str(path.resolve()) in out and "median final loss" in out


def test_summary_tells_a_worse_result_too():
    def method(name, level):
        losses = np.full((1, 1, 2), level)
        return quickstart.Method(name, losses, quickstart.tune(losses, [0.1]))

    def told(ours):
        levels = [("ours", ours), ("hand", 2.0), ("random", 3.0), ("adam", 1.0)]
        return quickstart._summary([method(*level) for level in levels])[0]

    assert "at or below" in told(1.0) and "above" in told(1.5)


def test_a_torn_last_line_waits(tmp_path):
    log = quickstart._Log(tmp_path / "metrics.jsonl")
    log.read()
    assert log.iteration == 0
    log.path.write_text('{"iteration": 1, "loss": 2.0}\n{"iteration": 2, "lo')
    log.read()
    assert log.iteration == 1 and "2.000" in log.told()


def test_nothing_is_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [str(quickstart._claim(None)) for _ in range(2)] == ["runs/quickstart-1", "runs/quickstart-2"]
    assert quickstart._claim("new/folder").is_dir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("kept")
    with pytest.raises(UserError, match="not empty"):
        quickstart._claim("mine")
    with pytest.raises(UserError, match="cannot use"):
        quickstart._claim(tmp_path / "mine" / "file")


def test_defaults_are_a_legal_config():
    settings = Settings()
    config = load(settings.config, settings.overrides)
    assert config.theta_init.kind == "hand_made" and config.tasks.datasets == ("digits",)
    assert (settings.hidden, settings.activation) != (tuple(config.tasks.hidden), config.tasks.activation)
    assert list(settings.learning_rates) == sorted(settings.learning_rates)
    assert np.allclose(np.diff(np.log10(settings.learning_rates)), 0.5, atol=2e-3)


@pytest.mark.drill
@pytest.mark.skipif(not os.environ.get("CELO_NNX_DRILLS"), reason="takes minutes: set CELO_NNX_DRILLS=1")
def test_the_whole_thing(tmp_path):
    settings = Settings(iterations=40, steps=40, seeds=(0,), learning_rates=(1e-3, 3.16e-3, 1e-2))
    path = quickstart.run(tmp_path / "out", settings)
    rows = json.loads((path.parent / "results.json").read_text("utf-8"))
    assert len(rows) == 4 and "kill -9" in path.read_text("utf-8")
    assert jax.tree.leaves(theta_io.load_theta(path.parent / "meta"))
