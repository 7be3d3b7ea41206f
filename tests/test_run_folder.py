"""Reading a run folder while it grows: only what is new, nothing twice, nothing taken on trust."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import fake_run
import made_run
import numpy as np
import pytest

from celo_nnx import files, lock, run_folder, series
from celo_nnx.errors import UserError
from celo_nnx.run_folder import Metrics, RunFolder

BEGIN = made_run.BEGIN


def same(one: Metrics, other: Metrics) -> bool:
    names = ("iteration", "time", "loss", "gradient_norm", "theta_norm", "update_norm")
    columns = [(one[name], other[name]) for name in names]
    for name in ("family_loss", "nonfinite"):
        mine, theirs = one.families(name), other.families(name)
        assert list(mine) == list(theirs)
        columns += zip(mine.values(), theirs.values(), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in columns)


def test_only_what_was_appended_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made_run.make(tmp_path / "a", made_run.course([3.0] * 1000))
    run = RunFolder(folder)
    added, parsed = [], []
    add, read_json = Metrics._add, run_folder.read_json
    monkeypatch.setattr(Metrics, "_add", lambda self, line: (added.append(line), add(self, line))[1])
    monkeypatch.setattr(run_folder, "read_json", lambda path: (parsed.append(path), read_json(path))[1])
    run.read()
    assert added == [] and parsed == []
    made_run.append(folder, made_run.course([2.0, None, 1.0], first=1001))
    run.read()
    assert len(added) == 3 and parsed == [] and run.iteration == 1003
    assert run.metrics["loss"][-3:].tolist() == pytest.approx([2.0, math.nan, 1.0], nan_ok=True)
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    run.read()
    assert [path.name for path in parsed] == ["config.json"]
    assert same(run.metrics, RunFolder(folder).metrics)


def test_a_torn_line_waits(tmp_path: Path) -> None:
    folder = made_run.make(tmp_path / "a", made_run.course([3.0, 2.0]))
    line = json.dumps(made_run.row(3, 1.0, BEGIN + 20)) + "\n"
    log = folder / "metrics.jsonl"
    run = RunFolder(folder)
    for part in (line[:30], line[30:-1]):
        with open(log, "a") as file:
            file.write(part)
        run.read()
        assert run.iteration == 2 and run.metrics.bad == 0
    with open(log, "a") as file:
        file.write("\n")
    run.read()
    assert run.iteration == 3 and run.metrics.bad == 0


@pytest.mark.parametrize("kept", [0, 4, 9])
@pytest.mark.parametrize("grown", [3, 6, 20])
def test_a_resumed_log_is_read_anew(tmp_path: Path, kept: int, grown: int) -> None:
    """Also where it has grown beyond its old size, with lines of the same length, between two looks."""
    rows = made_run.course([3.0] * 10)
    folder = made_run.make(tmp_path / "a", rows)
    run = RunFolder(folder)
    (folder / "metrics.jsonl").unlink()
    made_run.append(folder, rows[:kept])
    made_run.append(folder, made_run.course([2.0] * grown, first=kept + 1, begin=BEGIN + 50))
    run.read()
    assert run.iteration == kept + grown and run.metrics.bad == 0
    assert run.metrics["loss"].tolist() == [3.0] * kept + [2.0] * grown
    assert same(run.metrics, RunFolder(folder).metrics)


def test_a_log_that_vanishes_is_empty(tmp_path: Path) -> None:
    folder = made_run.make(tmp_path / "a", made_run.course([3.0]))
    run = RunFolder(folder)
    (folder / "metrics.jsonl").unlink()
    run.read()
    assert run.iteration == 0 and len(run.metrics) == 0


def test_what_is_no_row_is_left_out(tmp_path: Path) -> None:
    folder = made_run.make(tmp_path / "a", made_run.course([3.0, 2.0]))
    bad: list[Any] = [
        "",
        "x",
        "[1]",
        '{"loss": 1}',
        '{"iteration": "3"}',
        '{"iteration": 2}',
        '{"iteration": -1}',
    ]
    bad += ['{"iteration": 1' + "0" * 400 + "}", "[" * 100_000, "\x00\x00", '{"iteration": 3.5}']
    odd = {"loss": "low", "time": True, "family_loss": [1], "nonfinite": {"one": {}, "new": 3}}
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(f"{line}\n" for line in bad)
        file.write(json.dumps({"iteration": 3, **odd, "gradient_norm": 10**400}) + "\n")
        file.write('{"iteration": 4, "loss": NaN, "theta_norm": Infinity, "family_loss": {"late": 1.5}}\n')
    metrics = RunFolder(folder).metrics
    assert metrics.bad == len(bad) and metrics["iteration"].tolist() == [1, 2, 3, 4]
    assert np.isnan(metrics["loss"]).tolist() == [False, False, True, True]
    for name in ("gradient_norm", "theta_norm", "time"):
        assert np.isnan(metrics[name][2:]).all()
    assert metrics.families("family_loss")["late"].tolist() == pytest.approx(
        [math.nan] * 3 + [1.5], nan_ok=True
    )
    assert metrics.families("nonfinite")["new"].tolist() == pytest.approx(
        [math.nan, math.nan, 3.0, math.nan], nan_ok=True
    )


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made_run.make(tmp_path / "a")
    log = folder / "metrics.jsonl"
    with open(log, "wb") as file:
        file.truncate(2**22)
    with pytest.raises(UserError, match="a line is longer than 1048576 bytes"):
        RunFolder(folder)
    log.write_text(
        "".join(json.dumps({"iteration": i, "nonfinite": {f"f{i}": 1}}) + "\n" for i in range(1, 258))
    )
    with pytest.raises(UserError, match="more than 256 task families"):
        RunFolder(folder)
    log.unlink()
    os.mkfifo(log)
    with pytest.raises(UserError, match="metrics.jsonl is not a file"):
        RunFolder(folder)
    monkeypatch.setattr(files, "LARGEST", 10)
    with pytest.raises(UserError, match=r"config.json has \d+ bytes, at most 10 are read"):
        RunFolder(folder)


@pytest.mark.parametrize(
    ("phases", "total"),
    [([5, 3], 8), ([5, 0], 20), ([15, 9], 20), ([], 20), ([5, "three"], 20), ("no list", 20)],
)
def test_budgets_of_phases_limit_a_run(tmp_path: Path, phases: Any, total: int) -> None:
    config = fake_run.config(20)
    sections = [{"name": str(i), "iterations": n} for i, n in enumerate(phases)]
    config["meta"]["phases"] = phases if isinstance(phases, str) else sections
    assert RunFolder(made_run.make(tmp_path / "a", [], config=config)).total == total


def test_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made_run.make(tmp_path / "a", made_run.course([3.0, 2.0]), total=2, starts=[(BEGIN, 0)])
    run = RunFolder(folder)
    assert run.state() == "finished"
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"iterations": 2', '"iterations": 3')
    )
    run.read()
    assert run.state() == "interrupted" and run.total == 3
    with lock.hold(folder):
        assert run.state() == "running"
        info = json.loads((folder / "run_info.json").read_text())
        info["starts"].append({"time": BEGIN + 500, "iteration": 2})
        (folder / "run_info.json").write_text(json.dumps(info))
        run.read()
        assert run.state() == "starting" and run.wrote() == BEGIN + 500
        made_run.append(folder, [made_run.row(3, 1.0, BEGIN + 600)])
        run.read()
        assert run.state() == "running" and run.wrote() == BEGIN + 600
    assert run.state() == "finished"
    monkeypatch.setattr(lock, "held", lambda path: None)  # a file system without locks
    assert run.state(BEGIN + 630) == "running" and run.state(BEGIN + 700) == "finished"


def test_times(tmp_path: Path) -> None:
    """Two starts: 4 iterations in dispatches of 2, a second apart, then 6 from 100 seconds on."""
    rows = made_run.course([3.0] * 4) + made_run.course([2.0] * 6, first=5, begin=BEGIN + 110)
    run = RunFolder(made_run.make(tmp_path / "a", rows, starts=[(BEGIN, 0), (BEGIN + 100, 4)]))
    assert run.segments().tolist() == [0] * 4 + [1] * 6 and run.marks().tolist() == [1, 3, 5, 7, 9]
    assert run.rate() == 2.0  # iterations 6 to 10 in 2 seconds; the pause and the compilation do not count
    at, seconds = run.seconds_each()
    assert at.tolist() == [4, 8, 10] and seconds.tolist() == [0.5, 0.5, 0.5]
    assert run.seconds() == 11 + 12
    empty = RunFolder(made_run.make(tmp_path / "b"))
    assert math.isnan(empty.rate()) and empty.seconds() == 0 and empty.wrote() == BEGIN
    (tmp_path / "b" / "run_info.json").write_text('{"starts": [1, {"time": "x", "iteration": 1}]}')
    empty.read()
    assert empty.starts == [] and math.isnan(empty.wrote()) and empty.state() == "interrupted"


def test_phases(tmp_path: Path) -> None:
    rows = [made_run.row(i, 1.0, BEGIN, phase="rule" if i < 3 else "schedule") for i in range(1, 6)]
    run = RunFolder(made_run.make(tmp_path / "a", rows))
    assert run.metrics.phases == [(1, "rule"), (3, "schedule")] and run.phase == "schedule"


def test_looking_at_a_lock_stands_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    assert lock.held(tmp_path) is False and list(tmp_path.iterdir()) == []
    descriptor = None
    waits = []

    def look() -> int:
        number = os.open(tmp_path / lock.LOCK_NAME, os.O_RDONLY | os.O_CREAT)
        fcntl.flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return number

    def wait(seconds: float) -> None:
        waits.append(seconds)
        os.close(descriptor)

    descriptor = look()  # as another process's question does, for an instant
    monkeypatch.setattr(lock.time, "sleep", wait)
    with lock.hold(tmp_path):
        assert lock.held(tmp_path) is True
    assert len(waits) == 1 and lock.held(tmp_path) is False


@pytest.mark.parametrize("window", [1, 3, 20, 100])
def test_running_mean_against_a_loop(window: int) -> None:
    generator = np.random.default_rng(0)
    values = 1e6 + generator.normal(size=57)
    values[generator.random(57) < 0.4] = np.nan
    values[20:45] = np.nan
    expected = []
    for i in range(57):
        known = [v for v in values[max(0, i - window + 1) : i + 1] if not np.isnan(v)]
        expected.append(np.mean(known) if known and i + 1 >= window // 10 else np.nan)
    np.testing.assert_allclose(series.running_mean(values, window), expected, rtol=1e-14)


def test_extremes_keep_the_highest_and_the_lowest() -> None:
    values = np.random.default_rng(1).normal(size=12_345)
    values[77], values[9_999], values[5_000:5_100] = 50.0, -50.0, np.nan
    places = series.extremes(values, 100)
    assert len(places) <= 100 and {77, 9_999} <= set(places) and (np.diff(places) > 0).all()
    assert np.isnan(series.extremes(np.full(300, np.nan), 10)).sum() == 0
    assert series.resampled(np.arange(10.0), 5).tolist() == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert np.isnan(series.resampled(np.array([]), 3)).all()
