"""Results of an evaluation: scores recomputed by hand, aggregates over finished tasks, damaged files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import made_evaluation as made
import numpy as np
import pytest

from celo_nnx.cli import main
from celo_nnx.errors import UserError
from celo_nnx.evaluation.cells import Cells
from celo_nnx.evaluation.results import Evaluation, load_results, read_evaluation, write_evaluation
from celo_nnx.evaluation.standings import standings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.make(tmp_path_factory.mktemp("made") / "a")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


# The definitions of scores, once more and plainly.


def by_hand_smooth(losses: list[float], steps: int) -> list[float]:
    """Weights d^(t-j), each written out; infinite from the first loss that is not finite."""
    decay, out = 1 - 25 / steps, []
    for t in range(len(losses)):
        if not np.isfinite(losses[: t + 1]).all():
            out.append(float("inf"))
            continue
        weights = [decay ** (t - j) for j in range(max(0, t - 400), t + 1)]
        out.append(
            sum(w * x for w, x in zip(weights, losses[max(0, t - 400) :], strict=False)) / sum(weights)
        )
    return out


def by_hand(path: Path, task: str, label: str) -> dict[str, Any]:
    """Scores of an optimizer on a task from the stored files alone."""
    rows = [json.loads(line) for line in (path / "cells.jsonl").read_text().splitlines()]
    files = {row["digest"]: row for row in rows}
    stored: dict[tuple[str, int], tuple[dict[str, Any], np.ndarray]] = {}
    for file in path.glob("curves-*.npz"):
        row = files[hashlib.sha256(file.read_bytes()).hexdigest()]
        if row["task"] == task:
            stored[row["optimizer"], row["steps"]] = row, np.load(file)["losses"].astype(np.float64)

    def final(name: str) -> tuple[float, list[float]]:
        row, losses = stored[name, made.STEPS]
        ends = [[by_hand_smooth(run.tolist(), made.STEPS)[-1] for run in runs] for runs in losses]
        middles = [sorted(end)[1] for end in ends]
        best = middles.index(min(middles))
        return row["learning_rates"][best], ends[best]

    lowest = [float("inf")] * (4 * made.STEPS)
    for (name, _), (_, losses) in stored.items():
        for runs in losses if name == "adam" else ():
            smooth = [by_hand_smooth(run.tolist(), made.STEPS) for run in runs]
            for t, values in enumerate(zip(*smooth, strict=True)):
                lowest[t] = min(lowest[t], sorted(values)[1])
    for t in range(1, len(lowest)):
        lowest[t] = min(lowest[t], lowest[t - 1])

    floor = stored["adam", made.STEPS][0]["floor"] or 0.0
    rate, ends = final(label)
    out: dict[str, Any] = {"rate": rate, "final": ends, "score": [], "speedup": [], "at_least": []}
    for adam, own in zip(final("adam")[1], ends, strict=True):
        out["score"].append((adam - floor) / (own - floor) if np.isfinite(own) else 0.0)
        reached = [t + 1 for t, loss in enumerate(lowest) if loss <= own]
        needed = reached[0] if reached else len(lowest)
        out["speedup"].append(needed / made.STEPS if np.isfinite(own) else 0.0)
        out["at_least"].append(not reached)
    return out


@pytest.mark.parametrize("task", ["smooth", "noisy", "hard"])
@pytest.mark.parametrize("label", ["adam", "fast", "bad"])
def test_scores_agree_with_those_computed_by_hand(folder: Path, task: str, label: str) -> None:
    expected = by_hand(folder, task, label)
    [found] = [one.entries[label] for one in load_results(folder).tasks if one.name == task]
    assert found.training.learning_rate == expected["rate"]
    np.testing.assert_allclose(found.training.final, expected["final"], rtol=1e-9)
    np.testing.assert_allclose(found.score, expected["score"], rtol=1e-9)
    np.testing.assert_array_equal(found.speedup, expected["speedup"])
    np.testing.assert_array_equal(found.at_least, expected["at_least"])


def test_speedups_are_what_the_curves_were_made_for(folder: Path) -> None:
    smooth, _, hard = load_results(folder).tasks
    np.testing.assert_allclose(smooth.entries["fast"].speedup, 2 - 1 / 25, atol=0.02)
    # Of the median seed; seeds differ by half a step here.
    np.testing.assert_allclose(smooth.entries["adam"].speedup, 1.0, atol=0.005)
    assert smooth.entries["adam"].speedup[1] == 1.0
    assert hard.entries["fast"].speedup.tolist() == [4.0] * 3 and hard.entries["fast"].at_least.all()
    np.testing.assert_allclose(smooth.entries["adam"].score, 1.0)
    assert hard.cap == 4.0 and hard.floor == 1.0 and smooth.floor is None


def test_learning_rates_by_training_and_by_validation(folder: Path) -> None:
    entry = load_results(folder).tasks[1].entries["fast"]
    assert entry.training.learning_rate == 0.1 and entry.validation.learning_rate == 0.01
    # The validation losses were made from the training losses in the opposite order of rates.
    np.testing.assert_allclose(entry.validation.held_out["validation"], entry.training.final, rtol=0.1)
    assert (entry.validation.final > 1.5 * entry.training.final).all()
    np.testing.assert_allclose(entry.course[:, -1], entry.training.final)
    assert entry.at[0] == 1 and entry.at[-1] == made.STEPS and entry.course.shape == (3, len(entry.at))
    assert load_results(folder).tasks[0].entries["fast"].validation is None


def test_standings(folder: Path) -> None:
    results = load_results(folder)
    assert results.matrix("fast", "score").shape == (3, 3) and results.strays == 0
    fast, adam, bad = standings(results)
    assert [s.label for s in (fast, adam, bad)] == ["fast", "adam", "bad"]
    assert [s.place for s in (fast, adam, bad)] == [1, 0, 2]
    runs = np.sort(np.concatenate([by_hand(folder, t, "fast")["score"] for t in ("smooth", "noisy", "hard")]))
    assert fast.score["iqm"].value == pytest.approx(runs[2:7].mean(), abs=1e-9)
    assert fast.score["mean"].value == pytest.approx(runs.mean(), abs=1e-9)
    assert fast.score["iqm"].low <= fast.score["iqm"].value <= fast.score["iqm"].high
    # 3 of 9 lower bounds, and the IQM leaves 2 out.
    assert (fast.at_least, fast.runs, fast.bounded) == (3, 9, True) and not bad.bounded
    assert (fast.diverged, bad.diverged) == (0, 1)
    assert (fast.improvement.value, bad.improvement.value, adam.improvement) == (1.0, 0.0, None)
    assert adam.score["iqm"].low == adam.score["iqm"].high == pytest.approx(1.0)
    own = adam.speedup["iqm"].value
    assert fast.faster.value == pytest.approx(fast.speedup["iqm"].value - own, abs=1e-12)
    assert fast.faster.low > 0 and bad.faster.high < 0 and adam.faster is None
    # Measured as Adam's, save on one task of three.
    assert fast.step_time == fast.state == bad.state == 1.0


def test_relative_measurements_are_medians_over_tasks(copy: Path) -> None:
    rows = [json.loads(line) for line in (copy / "cells.jsonl").read_text().splitlines()]
    for row in rows:
        if row["optimizer"] == "fast" and row["task"] != "noisy":
            row["measured"] = {"step_seconds": 5e-3, "state_bytes": 0.0} if row["task"] == "hard" else {}
    (copy / "cells.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fast = standings(load_results(copy))[0]
    assert fast.step_time == pytest.approx((3 + 5) / 2) and fast.state == pytest.approx((2 + 0) / 2)


def test_step_times_on_other_devices_are_not_compared(copy: Path) -> None:
    rows = [json.loads(line) for line in (copy / "cells.jsonl").read_text().splitlines()]
    for row in rows:
        if row["optimizer"] == "fast" and row["task"] != "noisy" or row["optimizer"] == "bad":
            row["versions"]["devices"] = "1 x gpu"
    (copy / "cells.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fast, _, bad = standings(load_results(copy))
    assert fast.step_time == 3.0 and np.isnan(bad.step_time) and fast.state == bad.state == 1.0


def test_an_optimizer_under_way_leaves_the_others_their_scores(copy: Path) -> None:
    path = copy / "evaluation.json"
    value = json.loads(path.read_text())
    value["optimizers"].insert(1, {"label": "lion", "about": ""})
    before = {s.label: s for s in standings(load_results(copy))}
    path.write_text(json.dumps(value))
    results = load_results(copy)
    assert results.under_way() == {"lion": 0} and results.missing() == {}
    found = standings(results)
    assert [s.label for s in found] == ["fast", "adam", "bad"] and [s.place for s in found] == [2, 0, 3]
    assert all(s.score == before[s.label].score for s in found)
    # One task less than the furthest keeps up: it is what an evaluation task by task looks like.
    for task, behind in (("smooth", {"lion": 1}), ("noisy", {})):
        made.add(Cells(copy), task, "lion", made.grid(made.falling))
        assert load_results(copy).under_way() == behind
    assert load_results(copy).missing() == {"hard": "not yet run: lion"}
    # All wait for Adam, however far behind.
    lines = [line for line in (copy / "cells.jsonl").read_text().splitlines(True) if '"adam"' not in line]
    (copy / "cells.jsonl").write_text("".join(lines))
    results = load_results(copy)
    assert "adam" not in results.under_way() and results.finished() == () and standings(results) == []


def test_an_evaluation_under_way(folder: Path, tmp_path: Path) -> None:
    lines = (folder / "cells.jsonl").read_bytes().splitlines(keepends=True)
    whole = load_results(folder)
    for done, finished in ((0, []), (1, []), (4, ["smooth"]), (8, ["smooth", "noisy"])):
        copy = Path(shutil.copytree(folder, tmp_path / str(done)))
        (copy / "cells.jsonl").write_bytes(b"".join(lines[:done]) + lines[done][:50])
        results = load_results(copy)
        assert [task.name for task in results.finished()] == finished
        assert set(results.missing()) == {"smooth", "noisy", "hard"} - set(finished)
        assert bool(standings(results)) == bool(finished)
        if finished:
            want = whole.matrix("fast", "score")[:, : len(finished)]
            np.testing.assert_array_equal(results.matrix("fast", "score"), want)
    (tmp_path / "0" / "cells.jsonl").unlink()
    assert load_results(tmp_path / "0").missing()["hard"] == "not yet run: adam, fast, bad"
    assert not (tmp_path / "0" / "cells.jsonl").exists()


def test_a_task_waits_for_adams_runs_of_other_lengths(copy: Path) -> None:
    lines = (copy / "cells.jsonl").read_text().splitlines(keepends=True)
    lines.pop(9)  # Adam's 4 K steps on the last task
    (copy / "cells.jsonl").write_text("".join(lines))
    results = load_results(copy)
    assert results.missing() == {"hard": "not yet run: adam's runs of other lengths"}
    assert results.tasks[2].cap == 0.0 and results.tasks[2].entries["fast"].at_least.all()


def test_under_a_decaying_rate_speedups_are_read_from_the_ends_of_adams_runs(tmp_path: Path) -> None:
    plan = made.suite(("smooth",), schedule="cosine")
    write_evaluation(tmp_path, Evaluation(plan, tuple({"label": x, "about": ""} for x in ("adam", "fast"))))
    cells = Cells(tmp_path)

    def decaying(at: np.ndarray, rate: float, seed: int, pace: float = 1.0) -> np.ndarray:
        """Falls as a power of the steps, and is doubled by a rate that has not decayed yet."""
        level = 1 + abs(np.log10(rate / 0.1)) + 0.01 * seed
        return level * (2 - at / at[-1]) * (pace * at) ** -0.4

    made.add(cells, "smooth", "adam", made.grid(decaying), schedule="cosine")
    fast = made.grid(lambda at, rate, seed: decaying(at, rate, seed, pace=1.7))
    made.add(cells, "smooth", "fast", fast, schedule="cosine")
    for steps in (50, 100, 141, 283, 400, 566, 800):
        results = load_results(tmp_path)
        assert results.missing() == {"smooth": "not yet run: adam's runs of other lengths"}
        assert results.tasks[0].cap == 0.0
        made.add(cells, "smooth", "adam", made.grid(decaying, steps), schedule="cosine")
    results = load_results(tmp_path)
    [task] = results.finished()
    assert task.cap == 4.0 and results.strays == 0 and [c.steps for c in task.longer][-1] == 800
    assert task.entries["adam"].speedup[1] == 1.0  # of the median seed
    assert task.entries["fast"].speedup[1] == pytest.approx(1.7, rel=0.02)


def test_without_adam_there_are_losses_only(tmp_path: Path) -> None:
    made.begin(tmp_path, ("smooth",), ("fast",))
    made.add(Cells(tmp_path), "smooth", "fast", made.grid(made.falling))
    results = load_results(tmp_path)
    [task] = results.finished()
    assert task.entries["fast"].score is None and task.entries["fast"].speedup is None
    assert standings(results) == []


def test_negative_losses_without_a_floor_have_no_score(tmp_path: Path) -> None:
    made.begin(tmp_path, ("smooth",), ("adam", "fast"))
    cells = Cells(tmp_path)
    made.adam(cells, "smooth", made.falling)
    made.add(cells, "smooth", "fast", made.grid(lambda *a: made.falling(*a, low=-1.0)))
    results = load_results(tmp_path)
    assert results.finished() == () and "give the task's floor" in results.missing()["smooth"]
    assert results.tasks[0].entries["fast"].score is None
    assert results.tasks[0].entries["fast"].speedup.tolist() == [4.0] * 3


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    plan = made.suite(("smooth",), seeds=[5])
    write_evaluation(tmp_path, Evaluation(plan, ({"label": "adam", "about": ""},)))
    cells = Cells(tmp_path)
    for steps in (made.STEPS, 4 * made.STEPS):
        made.add(cells, "smooth", "adam", made.grid(made.falling, steps, seeds=(5,)), seeds=(5,))
    [adam] = standings(load_results(tmp_path))
    assert adam.score["iqm"].low is None and "at least 3 seeds" in adam.score["iqm"].note


def test_cells_that_belong_to_nothing_are_counted(copy: Path) -> None:
    cells = Cells(copy)
    made.add(cells, "elsewhere", "adam", made.grid(made.falling))
    made.add(cells, "smooth", "unlisted", made.grid(made.falling))
    made.add(cells, "smooth", "bad", made.grid(made.falling, 100))
    results = load_results(copy)
    assert results.strays == 3 and len(results.finished()) == 3


def test_a_written_evaluation_is_read_again(tmp_path: Path) -> None:
    plan = made.suite(()) | {"tasks": {"a": {"size": (1, 2)}, "b": {}}}
    first = Evaluation(plan, ({"label": "x", "about": ""},))
    path = write_evaluation(tmp_path / "new" / "folder", first)
    assert path.name == "evaluation.json" and os.listdir(path.parent) == ["evaluation.json"]
    found = read_evaluation(path.parent)
    assert found.suite["tasks"] == {"a": {"size": [1, 2]}, "b": {}} and found.labels == ("x",)
    write_evaluation(path.parent, dataclasses.replace(first, skipped={"b": "absent"}))
    assert read_evaluation(path.parent).tasks == ("a",) and os.listdir(path.parent) == ["evaluation.json"]


CHANGES: dict[str, Any] = {
    "suite": 3,
    "suite.name": "a\nb",
    "suite.steps": 10**400,
    "suite.schedule": "linear",
    "suite.seeds": [0, 0, 1],
    "suite.evaluations": True,
    "suite.batches": 0.5,
    "suite.tasks": {"a": 3},
    "suite.more": 1,
    "optimizers": [{"label": "adam", "about": ""}] * 2,
    "skipped": {"a": 3},
    "more": 1,
}


@pytest.mark.parametrize("key", CHANGES)
def test_what_an_evaluation_must_not_hold(key: str, tmp_path: Path) -> None:
    value = dataclasses.asdict(Evaluation(made.suite(("a",)), ({"label": "adam", "about": ""},)))
    *above, last = key.split(".")
    (value[above[0]] if above else value)[last] = CHANGES[key]
    (tmp_path / "evaluation.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match="evaluation.json") as caught:
        load_results(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    if set(value) == {"suite", "optimizers", "skipped"}:
        with pytest.raises(UserError, match="evaluation.json"):
            write_evaluation(tmp_path / "other", Evaluation(**value))
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[" * 10**6, b"null", b"[]", b"{}", b'"' + b"x" * 1000 + b'"', b"1" * 9999]
)
def test_files_that_are_no_evaluation(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "evaluation.json").write_bytes(content)
    assert main(["report", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "evaluation.json" in told and len(told) < 800
    assert os.listdir(tmp_path) == ["evaluation.json"]


def test_other_kinds_of_files(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it holds no evaluation.json"):
        load_results(tmp_path)
    with pytest.raises(UserError, match="it holds no evaluation.json"):
        load_results(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    for name in ("cells.jsonl", "evaluation.json"):
        (copy / name).unlink()
        os.mkfifo(copy / name)
        with pytest.raises(UserError, match=f"{name} is not a file"):
            load_results(copy)


def test_cells_that_do_not_fit_are_told(copy: Path) -> None:
    path = copy / "cells.jsonl"
    good = path.read_text()
    changes = {
        "learning rates other than the cell's": lambda row: row.update(training=0),
        "the curves of 'adam' on 'smooth' choose": lambda row: row.update(validation=0),
        "schedule or seeds other": lambda row: row.update(schedule="cosine"),
        "different floors": lambda row: row.update(floor=0.1),
        "line 1: floor": lambda row: row.update(floor=10**400),
        "line 1 is not JSON": lambda row: row.update(config={"x": float("nan")}),
        "steps is there twice": lambda row: row.update(config={"task": 1}),
    }
    for words, change in changes.items():
        first, *rest = good.splitlines()
        row = json.loads(first)
        change(row)
        lines = [json.dumps(row), *([first] if "twice" in words else []), *rest]
        path.write_text("\n".join(lines) + "\n")
        if not words.startswith("line"):
            _keep_curves(copy)
        with pytest.raises(UserError, match=words) as caught:
            load_results(copy)
        assert "cells.jsonl" in str(caught.value) and "\n" not in str(caught.value)


def _keep_curves(folder: Path) -> None:
    """Copies curves to the names that changed lines expect."""
    for cell in Cells(folder):
        if not (folder / cell.key.file()).exists():
            [same] = [p for p in folder.glob("*.npz") if _digest(p) == cell.digest][:1]
            shutil.copy(same, folder / cell.key.file())


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_random_damage_is_told_in_one_line(folder: Path, tmp_path: Path) -> None:
    """Numbers, names and brackets exchanged at random, some hundred times: results or one line."""
    generator = np.random.default_rng(0)
    pieces = [
        b"1e999",
        b"-1",
        b"null",
        b"[[[[]]]]",
        b"{}",
        b'"\\ud800"',
        b"9" * 400,
        b"[" * 3000 + b"]" * 3000,
    ]
    for name in ("evaluation.json", "cells.jsonl"):
        copy = Path(shutil.copytree(folder, tmp_path / name))
        for cell in Cells(copy):
            if cell.task != "smooth":  # quicker
                (copy / cell.key.file()).unlink()
        lines = (copy / "cells.jsonl").read_bytes().splitlines(keepends=True)
        (copy / "cells.jsonl").write_bytes(b"".join(line for line in lines if b'"task": "smooth"' in line))
        good = (copy / name).read_bytes()
        for _ in range(150):
            marks = [i for i, c in enumerate(good) if c in b'[{:,0"']
            at = int(generator.choice(marks)) + 1
            end = at + int(generator.integers(0, 12))
            (copy / name).write_bytes(good[:at] + pieces[generator.integers(len(pieces))] + good[end:])
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    load_results(copy)
            except UserError as error:
                assert "\n" not in str(error).strip() and len(str(error)) < 30_000


def test_curves_of_nothing_but_nan(tmp_path: Path) -> None:
    made.begin(tmp_path, ("smooth",), ("adam", "fast"))
    cells = Cells(tmp_path)
    bad = np.full((4, 3, made.STEPS), np.nan, np.float32)
    made.adam(cells, "smooth", made.falling)
    made.add(cells, "smooth", "fast", bad, validation=np.full((4, 3, 2), np.inf, np.float32))
    entry = load_results(tmp_path).tasks[0].entries["fast"]
    assert entry.score.tolist() == entry.speedup.tolist() == [0.0] * 3 and not entry.at_least.any()
