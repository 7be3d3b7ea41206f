"""The report of an evaluation: complete, true to the results, self-contained, safe with any text and file."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import made_evaluation as made
import numpy as np
import pytest

from celo_nnx.cli import main
from celo_nnx.errors import UserError
from celo_nnx.evaluation import page, plots, suite_csv, suite_plots, suite_report, suite_words
from celo_nnx.evaluation.aggregates import Estimate
from celo_nnx.evaluation.cells import Cells
from celo_nnx.evaluation.results import Evaluation, load_results, write_evaluation
from celo_nnx.evaluation.standings import standings

NASTY = """<script>alert("1")</script>&'$\\foo$"""


class Page(HTMLParser):
    """Balanced tags, the rows of every table, and the text of the elements of a tag."""

    void = {"meta", "br", "link", "path", "use", "rect", "img"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.words: dict[str, list[str]] = {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "br" and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += " "
        if tag not in self.void:
            self.open.append(tag)
            self.words.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        for tag in set(self.open):
            self.words[tag][-1] += data

    def found(self, first: str) -> list[list[str]]:
        return [row[1:] for row in self.rows if row and row[0] == first]


def self_contained(text: str) -> None:
    assert not re.search(r'(src|href)="(?!#)', text.replace("xlink:href", "href"))
    assert "@import" not in text and "<script" not in text.lower() and "url(http" not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) and plots.INK not in text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = made.make(tmp_path_factory.mktemp("made") / "a")
    assert suite_report.write(folder) == folder / "report.html"
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_page_is_complete_and_self_contained(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    parsed = Page(text)
    self_contained(text)
    headings = ["What was compared", "Scores", "Performance profiles", "Task by task"]
    assert parsed.words["h2"][:4] == headings and text.count("<svg") == 3 + 2 * 3
    assert text.count('<details class="task" open>') == 3
    for label, about in made.ABOUT.items():
        assert [about] in parsed.found(label)
        # Score table, both tables by task have them as columns, and in every task a row and its costs.
        assert len(parsed.found(label)) == 2 + 2 * 3
    assert "<b>lm_large</b>: text &#39;lm1b&#39; not found" in text
    assert "1 task of the suite was skipped" in text and "not finished" not in text
    assert "bad: training: the best learning rate, 1, lies on the grid&#39;s upper edge" in text
    assert "bad: 1 of 3 runs diverged at the chosen learning rate" in text
    assert "2 warnings on learning rates and diverged runs" in text
    for words in (
        "K / 25",
        "3.12.0",
        "2 x cpu",
        "constant, the same for all but learned schedules",
        "celo-nnx evaluate mine --run-dir here",
    ):
        assert words in text


def test_its_numbers_are_those_of_the_results(folder: Path) -> None:
    parsed = Page((folder / "report.html").read_text())
    results = load_results(folder)
    fast, _, bad = standings(results)
    shown, ends = suite_words.shown, suite_words.ends
    for standing, least, better in ((fast, "33 %", "1.00"), (bad, "0 %", "0.00")):
        row = next(row for row in parsed.found(standing.label) if len(row) == 10)
        score, speedup = standing.score, standing.speedup
        assert row[0] == f"{shown(score['iqm'].value)} {ends(score['iqm'])}"
        assert row[1:3] == [shown(score["median"].value), shown(score["mean"].value)]
        sign = "≥ " if standing is fast else ""
        assert row[3] == f"{sign}{shown(speedup['iqm'].value)} {ends(speedup['iqm'])}"
        assert row[4] == f"{sign}{shown(standing.faster.value)} {ends(standing.faster)}"
        assert row[5] == least and row[6].split()[0] == better
        assert row[7:] == [f"{standing.diverged} of 9", "1 ×", "1 ×"]
    assert ["1.00", "≥ 4.00", "0.410"] in parsed.found("hard")
    noisy = results.tasks[1].entries["fast"]
    [row] = [row for row in parsed.found("fast") if len(row) == 7 and row[4] == "0.0100"]
    assert row[0] == "0.100" and row[1].split()[0] == shown(np.median(noisy.training.final))
    assert row[2].split()[0] == shown(np.median(noisy.score))
    assert row[3].split()[0] == shown(np.median(noisy.speedup))
    assert row[5] == shown(np.median(noisy.validation.final))
    assert row[6] == shown(np.median(noisy.validation.held_out["validation"]))
    assert ["3 ms", "-", "9 s", "16", "-"] in parsed.found("fast")
    assert parsed.found("bad")[-2][1].startswith("2.08") and "1.26 to diverged" in str(parsed.rows)


def test_the_csv_files_are_the_results_in_full(folder: Path) -> None:
    runs, results = read(folder / "scores.csv"), load_results(folder)
    assert len(runs) == 3 * 3 * 3 and tuple(runs[0]) == suite_csv.RUNS
    for row in runs:
        entry = next(task.entries[row["optimizer"]] for task in results.tasks if task.name == row["task"])
        i = made.SEEDS.index(int(row["seed"]))
        assert float(row["learning_rate"]) == entry.training.learning_rate
        assert float(row["final_loss"]) == entry.training.final[i]
        assert float(row["score"]) == entry.score[i] and float(row["speedup"]) == entry.speedup[i]
        assert row["speedup_is_lower_bound"] == str(bool(entry.at_least[i]))
        for name in ("validation", "test"):
            held_out = entry.training.held_out.get(name)
            assert row[f"{name}_loss"] == ("" if held_out is None else str(held_out[i].item()))
        assert row["diverged"] == str(float(row["final_loss"]) == float("inf"))
    assert sum(row["validation_loss"] != "" for row in runs) == 3 * 4
    assert sum(row["diverged"] == "True" for row in runs) == 1
    assert sum(row["speedup_is_lower_bound"] == "True" for row in runs) == 3
    rows = {row["optimizer"]: row for row in read(folder / "summary.csv")}
    assert list(rows) == ["adam", "fast", "bad"]
    for standing in standings(results):
        row = rows[standing.label]
        assert float(row["score_iqm"]) == standing.score["iqm"].value
        assert float(row["speedup_median_high"]) == standing.speedup["median"].high
        assert float(row["state_over_adam"]) == standing.state and row["about"] == standing.about
        assert (row["tasks"], row["runs"], row["diverged"]) == ("3", "9", str(standing.diverged))
    assert rows["adam"]["improvement_over_adam"] == "" and rows["fast"]["improvement_over_adam"] == "1.0"


def test_the_result_is_told_whichever_way_it_falls(folder: Path) -> None:
    results = load_results(folder)
    ranking = standings(results)
    fast, adam, bad = ranking
    first, second = suite_words.verdict(results, ranking)
    value = suite_words.interval(fast.score["iqm"])
    words = "fast has the highest final-loss score of 2 optimizers besides Adam"
    assert f"Over 3 tasks and 3 seeds, {words}, {value}; tuned Adam has 1." in first
    assert "The interval lies above 1: fast ends at lower losses than Adam." in first
    told = second
    assert (
        "at least 2.29" in second and "The interval lies above 0: fast needs fewer steps than Adam" in second
    )
    first, second = suite_words.verdict(results, [adam, bad])
    assert first.startswith("Over 3 tasks and 3 seeds, bad has a final-loss score of 0.342 [")
    assert "The interval lies below 1: bad ends at higher losses than Adam." in first
    assert "bad needs more steps than Adam" in second
    assert "adam alone was evaluated" in suite_words.verdict(results, [adam])[0]
    assert f"the difference at least {suite_words.interval(fast.faster)}. The interval lies" in told
    for estimate, words in (
        (Estimate(1.1, 1.1, 1.1), "The interval has no width, so how sure this is cannot be said."),
        (Estimate(1.1, 0.9, 1.2), "The interval includes 1: x cannot be told from Adam by it."),
        (Estimate(1.1, 1.0, 1.2), "The interval includes 1: x cannot be told from Adam by it."),
        (
            Estimate(1.1, None, None),
            "With fewer than 3 seeds there is no interval, so how sure this is cannot be said.",
        ),
    ):
        assert suite_words.against("x", estimate, 1, "is better", "is worse") == words


def test_speedups_that_are_lower_bounds_have_a_sign() -> None:
    entry: Any = type("Entry", (), {})()
    for values, at_least, expected in (
        ([4.0, 1.0, 2.0], [1, 0, 0], ("2.00", "1.00 to ≥ 4.00")),
        ([4.0, 4.0, 2.0], [1, 1, 0], ("≥ 4.00", "2.00 to ≥ 4.00")),
        ([4.0, 4.0], [1, 1], ("≥ 4.00", "≥ 4.00 to ≥ 4.00")),
        ([4.0, 2.0], [1, 0], ("≥ 3.00", "2.00 to ≥ 4.00")),
        ([1.0, 4.0, 2.0, 3.0], [0, 1, 0, 0], ("2.50", "1.00 to ≥ 4.00")),
        ([0.0], [0], ("0", "")),
    ):
        entry.speedup, entry.at_least = np.array(values), np.array(at_least, bool)
        assert suite_words.speedups(entry) == expected


def test_one_seed_is_told_to_have_no_interval(tmp_path: Path) -> None:
    plan = made.suite(("smooth",), seeds=[5])
    optimizers = ({"label": "adam", "about": ""}, {"label": "fast", "about": ""})
    write_evaluation(tmp_path, Evaluation(plan, optimizers))
    cells = Cells(tmp_path)
    for label, steps in (("adam", made.STEPS), ("adam", 4 * made.STEPS), ("fast", made.STEPS)):
        made.add(cells, "smooth", label, made.grid(made.falling, steps, seeds=(5,)), seeds=(5,))
    text = suite_report.write(tmp_path).read_text()
    Page(text)
    assert "no interval: it takes at least 3 seeds" in text and "With fewer than 3 seeds" in text
    assert read(tmp_path / "summary.csv")[1]["score_iqm_low"] == ""


def test_an_evaluation_under_way_is_reported(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "cells.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for done, words, figures in (
        (0, "Nothing has run yet.", 0),
        (2, "so there is no result yet", 2),
        (5, "all optimizers are done with 1 of 3 tasks, and only those count", 7),
    ):
        path.write_text("".join(lines[:done]))
        assert main(["report", str(copy)]) == 0
        assert capsys.readouterr().out == f"report: {copy / 'report.html'}\n"
        text = (copy / "report.html").read_text()
        Page(text)
        self_contained(text)
        assert words in text and text.count("<svg") == figures
        assert "The evaluation is not finished" in text
        assert len(read(copy / "scores.csv")) == 3 * len(_cells(lines[:done]))
        assert len(read(copy / "summary.csv")) == (3 if done >= 5 else 0)
    assert "<b>noisy</b>: not yet run: fast, bad" in text and "<b>smooth</b>" not in text


def test_what_is_under_way_and_mixed_is_told_at_the_top(copy: Path) -> None:
    value = json.loads((copy / "evaluation.json").read_text())
    value["optimizers"].append({"label": "lion", "about": ""})
    (copy / "evaluation.json").write_text(json.dumps(value))
    path = copy / "cells.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["optimizer"] == "bad":
            row["versions"] |= {"jax": "0.9.0", "devices": "1 x gpu"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parsed = Page(suite_report.write(copy).read_text())
    top = " ".join(parsed.words["p"][:6])
    assert "Under way, and so left out of the scores over tasks: lion, 0 of 3 tasks." in top
    assert "Not all runs were made with the same jax: 0.10.2; 0.9.0." in top
    assert (
        "the same devices: 2 x cpu; 1 x gpu, so step times are only compared" in top and "python" not in top
    )
    [row] = [row for row in parsed.found("bad") if len(row) == 10]
    assert row[8:] == ["-", "1 ×"]
    assert "lion" not in [row["optimizer"] for row in read(copy / "summary.csv")]
    assert len(read(copy / "scores.csv")) == 27


def _cells(lines: list[str]) -> set[tuple[str, str]]:
    return {(row["task"], row["optimizer"]) for row in map(json.loads, lines) if row["steps"] == made.STEPS}


def test_without_adam_there_are_losses(tmp_path: Path) -> None:
    made.begin(tmp_path, ("smooth",), ("fast",))
    made.add(Cells(tmp_path), "smooth", "fast", made.grid(made.falling))
    text = suite_report.write(tmp_path).read_text()
    assert "adam is not among the optimizers" in text and text.count("<svg") == 2
    assert Page(text).found("fast")[1][0] == "0.100"
    assert read(tmp_path / "scores.csv")[0]["score"] == ""


def test_any_text_is_escaped(tmp_path: Path) -> None:
    plan = made.suite((), name=NASTY) | {"tasks": {NASTY: {}, "_a": {NASTY: NASTY}}}
    optimizers = tuple(
        {"label": label, "about": NASTY + "\ud800\x1b"} for label in ("adam", NASTY, "_hidden")
    )
    write_evaluation(tmp_path, Evaluation(plan, optimizers, {"<b>": NASTY}))
    cells = Cells(tmp_path)
    texts = dict(config={NASTY: "\ud800"}, versions={NASTY: NASTY}, measured={NASTY: 1.0})
    for task in (NASTY, "_a"):
        made.add(cells, task, "adam", made.grid(made.falling, 4 * made.STEPS), **texts)
        for label in ("adam", NASTY, "_hidden"):
            made.add(cells, task, label, made.grid(made.falling), warnings=(NASTY, "\x1b[2J"), **texts)
    text = suite_report.write(tmp_path).read_text()
    parsed = Page(text)
    self_contained(text)
    assert "<b>:" not in text and "\x1b" not in text and text.count("alert") > 20
    assert parsed.words["h1"] == [f"Evaluation {NASTY}"] and "_hidden" in text
    assert read(tmp_path / "scores.csv")[3]["task"] in (NASTY, "_a")


def test_curves_of_any_kind_can_be_drawn(tmp_path: Path) -> None:
    made.begin(tmp_path, ("flat", "wild", "floored", "low"), ("adam", "fast"))
    cells = Cells(tmp_path)
    shape = (4, 3, made.STEPS)
    ragged = np.full(shape, 3e38, np.float32)
    ragged[0, :, 5:] = np.inf
    ragged[:, :2, 0] = np.inf
    for task, one, floor in (
        ("flat", np.zeros(shape, np.float32), None),
        ("wild", ragged, None),
        ("floored", np.full(shape, 2.0, np.float32), 2.0),
        ("low", np.full(shape, -3.0, np.float32), -4.0),
    ):
        made.add(cells, task, "adam", one, floor=floor)
        made.add(cells, task, "adam", np.repeat(one, 4, axis=2), floor=floor)
        made.add(cells, task, "fast", np.full(shape, np.nan, np.float32), floor=floor)
    text = suite_report.write(tmp_path).read_text()
    Page(text)
    self_contained(text)
    assert text.count("<svg") == 3 + 8


def test_forty_optimizers_are_told_apart_and_many_tasks_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite_report, "OPEN", 1)
    assert len({plots.style(i) for i in range(40)}) == 40
    labels = ["adam", *(f"rule{i}" for i in range(9))]
    tasks = ["t0", "t1"]
    made.begin(tmp_path, tasks, labels)
    cells = Cells(tmp_path)
    for task in tasks:
        made.add(cells, task, "adam", made.grid(made.falling, 4 * made.STEPS))
        for label in labels:
            made.add(cells, task, label, made.grid(made.falling))
    text = suite_report.write(tmp_path).read_text()
    assert text.count('<details class="task">') == 2 and "Bands:" not in text and "range of all" not in text
    results = load_results(tmp_path)
    axes = suite_plots.profile_figure(results, standings(results), "score").axes[0]
    lines = [line for line in axes.lines if not line.get_label().startswith("_")]
    assert [line.get_label() for line in lines] == labels
    assert len({(line.get_color(), str(line._dash_pattern)) for line in lines}) == 10


def test_pictures_show_the_results(folder: Path) -> None:
    results = load_results(folder)
    labels = results.evaluation.labels
    hard = results.tasks[2]
    axes = suite_plots.curves_figure(hard, labels).axes[0]
    assert axes.get_ylabel() == "training loss above 1"
    named = {line.get_label().split()[0]: line for line in axes.lines}
    for label, entry in hard.entries.items():
        np.testing.assert_allclose(named[label].get_ydata(), np.median(entry.course, axis=0) - 1.0)
        assert named[label].get_color() == plots.style(labels.index(label))[0]
    rates = suite_plots.rates_figure(hard, labels).axes[0]
    np.testing.assert_allclose(rates.lines[0].get_ydata(), hard.entries["adam"].tuned.medians - 1.0)
    ranking = standings(results)
    profile = suite_plots.profile_figure(results, ranking, "speedup").axes[0].lines[1]
    matrix = results.matrix("fast", "speedup")
    for x, y in zip(profile.get_xdata()[::20], profile.get_ydata()[::20], strict=True):
        assert y == pytest.approx((matrix > x).mean())
    left, right = suite_plots.dots_figure(ranking).axes
    assert [t.get_text() for t in left.get_yticklabels()] == ["fast", "adam", "bad"]
    dots = [line.get_xdata()[0] for line in right.lines if line.get_marker() == "o"]
    assert dots == [standing.speedup["iqm"].value for standing in ranking]


def test_what_may_be_overwritten(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (copy / "report.html").read_text()
    monkeypatch.setattr(suite_report, "html", lambda *_: text)  # its figures take time
    for name in ("report.html", "scores.csv", "summary.csv"):
        before = {path.name: path.read_bytes() for path in copy.iterdir()}
        assert main(["report", str(copy)]) == 0
        (copy / name).write_text("mine")
        capsys.readouterr()
        assert main(["report", str(copy)]) == 2
        captured = capsys.readouterr()
        assert f"{name} exists; name a new file" in captured.err and captured.err.count("\n") == 1
        assert (copy / name).read_text() == "mine" and captured.out == ""
        (copy / name).write_bytes(before[name])
    out = tmp_path / "new.html"
    assert main(["report", str(copy), "--out", str(out)]) == 0 and page.MARK in out.read_bytes()
    assert (tmp_path / "new-scores.csv").read_bytes() == (copy / "scores.csv").read_bytes()
    assert (tmp_path / "new-summary.csv").exists()
    with pytest.raises(UserError, match="new.html exists"):
        suite_report.write(copy, out)
    out.unlink()
    with pytest.raises(UserError, match="new-scores.csv exists"):
        suite_report.write(copy, out)
    assert not out.exists()
    with pytest.raises(UserError, match="no folder"):
        suite_report.write(copy, tmp_path / "none" / "x.html")
    assert not [name for name in os.listdir(copy) if name.endswith(".part")]


def test_a_config_nested_too_deeply_is_told(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def html(*_: Any) -> str:
        raise RecursionError

    before = {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}
    monkeypatch.setattr(suite_report, "html", html)
    with pytest.raises(UserError, match="nested too deeply"):
        suite_report.write(copy)
    assert before == {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}
