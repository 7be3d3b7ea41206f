"""The report of a run: complete, self-contained, true to the log, safe with any folder and any file."""

from __future__ import annotations

import base64
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import made_run
import numpy as np
import pytest

from celo_nnx import lock, run_files, run_report
from celo_nnx.cli import main
from celo_nnx.config import load
from celo_nnx.description import describe
from celo_nnx.errors import UserError
from celo_nnx.evaluation import page, plots
from celo_nnx.meta.checkpoint import canonical
from celo_nnx.run_folder import RunFolder
from celo_nnx.theta_io import FILE_NAME, load_theta, save_theta

BEGIN = made_run.BEGIN
NASTY = """<script>alert("1")</script>&'$\\foo$"""


class Page(HTMLParser):
    """Balanced tags, the text of every element with its tag, and the cells of every table."""

    void = {"meta", "br", "link", "path", "use", "rect", "img"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.words: dict[str, list[str]] = {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        if self.open:
            self.words.setdefault(self.open[-1], []).append(data)

    def row(self, first: str) -> list[str]:
        [row] = [row for row in self.rows if row and row[0] == first]
        return row[1:]


def config(*overrides: str) -> dict[str, Any]:
    return run_files.resolve(load("celo2:fast_digits", overrides))


def self_contained(text: str) -> None:
    assert not re.search(r'(src|href)="(?!#|data:image/svg)', text.replace("xlink:href", "href"))
    assert "@import" not in text and "<script" not in text.lower() and "url(http" not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) and plots.INK not in text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], str]:
    """A run of 3,000 iterations that was resumed at 1,000 and has two phases: folder, rows, report."""
    generator = np.random.default_rng(0)
    losses = (2 + np.exp(-np.arange(3000) / 500) + 0.1 * generator.normal(size=3000)).tolist()
    losses[2990] = losses[7] = None
    rows = made_run.course(losses[:1000]) + made_run.course(losses[1000:], first=1001, begin=BEGIN + 900)
    rows = [row | {"phase": "rule" if row["iteration"] <= 2000 else "schedule"} for row in rows]
    folder = made_run.make(
        tmp_path_factory.mktemp("made") / "a",
        rows,
        total=5000,
        starts=[(BEGIN, 0), (BEGIN + 800, 1000)],
        config=config("run.iterations=5000", "optimizer.schedule.value=0.25"),
    )
    assert run_report.write(folder) == folder / "report.html"
    return folder, rows, (folder / "report.html").read_text("utf-8")


def test_it_is_complete_and_self_contained(made: tuple[Path, list[dict[str, Any]], str]) -> None:
    folder, _, text = made
    page = Page(text)
    self_contained(text)
    headings = ["Losses", "Meta-loss", "Losses of the families", "Norms", "Non-finite inner losses"]
    headings += ["Time of a meta-iteration", "Using the result", "Time", "The optimizer", "Config", "Data"]
    assert page.words["h2"] == headings and text.count("<svg") == 5
    assert len(text) < 600_000
    for words in ("resumed", "phase schedule", "3,000 of 5,000 meta-iterations are done", "ab" * 32):
        assert words in text
    assert page.row("2023-11-14 22:26:40") == ["1,000", "2 x cpu", "python 3.12.0, jax 0.10.2", "-"]
    changed = [row for row in page.rows if row[0] in ("optimizer.schedule.value", "run.iterations")]
    assert ["optimizer.schedule.value", "0.25", "1.0"] in changed or len(changed) == 4
    drawing = next(v for k, v in page.attributes if k == "src")
    svg = base64.b64decode(drawing.split(",")[1]).decode()
    assert svg.startswith("<svg") and "value=0.25" in svg
    assert str(folder / FILE_NAME) in text


def test_its_numbers_are_those_of_the_log(made: tuple[Path, list[dict[str, Any]], str]) -> None:
    _, rows, text = made
    page = Page(text)

    def mean(some: list[dict[str, Any]], *keys: str) -> float:
        values = []
        for row in some:
            value: Any = row
            for key in keys:
                value = value[key]
            values += [] if value is None else [value]
        return float(np.mean(values))

    last, first = mean(rows[-200:], "loss"), mean(rows[:200], "loss")
    sentence = (
        f"averaged over the last 200 meta-iterations is {last:.4g}; over the first 200 it was {first:.4g}."
    )
    assert sentence in text and "2 inner losses were not finite." in text
    assert page.row("meta-loss") == [f"{first:.4g}", f"{last:.4g}", f"{last - first:+.3g}", "2"]
    one = mean(rows[-200:], "family_loss", "one")
    assert page.row("one")[1:] == [f"{one:.4g}", f"{one - mean(rows[:200], 'family_loss', 'one'):+.3g}", "2"]
    assert page.row("two")[3] == "0"
    assert page.row("1 to 250") == [f"{mean(rows[:250], 'loss'):.4g}", "2", "0.001", "10"]
    assert page.row("2,751 to 3,000")[0] == f"{mean(rows[2750:], 'loss'):.4g}"
    # 500 dispatches from the 10th second on, 1,000 from the 100th second after the second start on.
    assert page.words["dd"][0] == "26:48" and 509 + 1099 == 26 * 60 + 48


def test_the_curves_are_those_of_the_log(
    made: tuple[Path, list[dict[str, Any]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rows, _ = made
    drawn: dict[str, Any] = {}
    figure = plots.course_figure
    monkeypatch.setattr(
        plots,
        "course_figure",
        lambda lines, y, events: drawn.update({y: (lines, events)}) or figure(lines, y, events),
    )
    run_report.figures(RunFolder(folder))
    losses = {row["iteration"]: row["loss"] for row in rows}
    (raw, smooth), events = drawn["meta-loss"]
    assert len(raw.x) <= 1000 and len(smooth.x) <= 1000 and smooth.x[-1] == 3000
    assert [losses[x] for x in raw.x] == raw.y.tolist()
    known = [v for v in losses.values() if v is not None]
    assert raw.y.max() == max(known) and raw.y.min() == min(known)
    for x, y in zip(smooth.x[::97], smooth.y[::97], strict=True):
        window = [losses[i] for i in range(max(1, int(x) - 119), int(x) + 1) if losses[i] is not None]
        assert (np.isnan(y) and x < 12) or y == pytest.approx(np.mean(window))
    assert events == [(1000, "resumed"), (2001, "phase schedule")]
    assert [line.name for line in drawn["loss"][0]] == ["one", "two"]
    assert drawn["non-finite inner losses"][0][0].y[-1] == 2
    seconds = drawn["seconds"][0][0]
    assert set(seconds.y) == {0.5} and len(seconds.x) <= 1000


def test_any_text_is_escaped(tmp_path: Path) -> None:
    settings = config()
    settings["tasks"]["datasets"] = [NASTY]
    settings[NASTY] = {"\x1b[2J\ud800": NASTY}
    settings["optimizer"]["accumulators"] = {NASTY: settings["optimizer"]["accumulators"]["momentum"]}
    names = [NASTY, "_hidden", "", "\ud800", "数"]
    rows = [
        made_run.row(i, 1.0, BEGIN + i, phase=NASTY if i > 2 else "x")
        | {"family_loss": dict.fromkeys(names, 1.0 + i), "nonfinite": dict.fromkeys(names, 1)}
        for i in range(1, 30)
    ]
    folder = made_run.make(tmp_path / "a<b>&", rows, config=settings)
    info = {"data": {NASTY: NASTY}, "starts": [{"time": 1e300, "iteration": 3, "versions": {NASTY: NASTY}}]}
    info["starts"][0] |= {"devices": NASTY, "xla_flags": NASTY}
    (folder / "run_info.json").write_text(json.dumps(info))
    text = run_report.write(folder).read_text("utf-8")
    page = Page(text)
    self_contained(text)
    assert "<b>" not in text and "\x1b" not in text and page.words["h1"] == ["Meta-training run a<b>&"]
    assert text.count("alert") > 8 and text.count("<svg") == 5 and "_hidden" in text and "数" in text
    assert page.row("'\\ud800'") == page.row("数") == ["16", "16", "+0", "29"]
    cells = [row[1:] for row in page.rows if row[0].startswith(NASTY) or row[0].endswith("\\ud800'")]
    assert ["16", "16", "+0", "29"] in cells and [NASTY] in cells


def test_hostile_sizes_take_no_memory(tmp_path: Path) -> None:
    settings = config()
    settings["optimizer"]["update_rule"]["hidden"] = [10**9, 10**9]
    text = run_report.write(made_run.make(tmp_path / "a", config=settings)).read_text("utf-8")
    assert "optimizer cannot be built here: " in text and "1000000000" in text


@pytest.mark.parametrize("section", [None, 3, [], {}, {"accumulators": {}}, "unknown", "type"])
def test_an_optimizer_that_cannot_be_built_costs_no_report(section: Any, tmp_path: Path) -> None:
    settings = config()
    if section == "unknown":
        settings["optimizer"]["features"]["groups"] = ["from_elsewhere"]
    elif section == "type":
        settings["optimizer"]["update_rule"]["hidden"] = "wide"
    else:
        settings["optimizer"] = section
    text = run_report.write(made_run.make(tmp_path / "a", config=settings)).read_text("utf-8")
    assert "optimizer cannot be built here: " in text and "<img" not in text
    Page(text)


def test_the_optimizer_is_that_of_theta_s_phase(tmp_path: Path) -> None:
    folder = made_run.make(tmp_path / "a", config=config())
    section = config("optimizer.schedule.value=0.25")["optimizer"]
    header = {"config": canonical(config() | {"optimizer": section})}
    save_theta(folder / FILE_NAME, run_report.build(section).theta, header)
    used: dict[str, Any] = {}
    exec(run_report.usage(folder), used)
    assert json.loads(used["optimizer"].config)["schedule"]["value"] == 0.25
    assert "value=0.25" in run_report.write(folder).read_text("utf-8")


def test_shapes_alone_describe_the_same() -> None:
    section = config("optimizer.schedule.value=0.25")["optimizer"]
    text, drawing = run_report.described(section, "a title")
    assert text == describe(run_report.build(section)) and drawing.startswith("data:image/svg+xml;base64,")


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_few_rows(rows: int, tmp_path: Path) -> None:
    folder = made_run.make(tmp_path / "a", made_run.course([2.5] * rows), config=config())
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 9, "lo')
    with lock.hold(folder):
        text = run_report.write(folder).read_text("utf-8")
    Page(text)
    assert ("under way" if rows else "is starting") in text
    assert text.count("<svg") == (3 if rows == 2 else 0)
    expected = f"averaged over the last {rows} meta-iterations is 2.5;" if rows else "no meta-iteration yet"
    assert expected in text


def test_a_run_of_nothing_but_nan(tmp_path: Path) -> None:
    folder = made_run.make(tmp_path / "a", made_run.course([None] * 50), config=config())
    text = run_report.write(folder).read_text("utf-8")
    Page(text)
    assert "No meta-loss of the last 50 meta-iterations is finite." in text and "nobody works at it" in text
    assert "<h2>Norms</h2>" in text and "<h2>Meta-loss</h2>" not in text


def test_what_may_be_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made_run.make(tmp_path / "a", made_run.course([2.5]), config=config())
    default = folder / "report.html"
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"report: {default}\n"
    made_run.append(folder, made_run.course([2.0], first=2))
    assert main(["report", str(folder)]) == 0 and "over the last 2 meta" in default.read_text()
    assert sorted(os.listdir(folder)) == ["config.json", "metrics.jsonl", "report.html", "run_info.json"]
    default.write_text("mine")
    capsys.readouterr()
    for argv, words in (
        ([], "report.html exists; name a new file"),
        (["--out", str(default)], "report.html exists; name a new file"),
        (["--out", str(folder / "config.json")], "config.json exists; name a new file"),
        (["--out", str(tmp_path)], "exists; name a new file"),
        (["--out", str(tmp_path / "none" / "x.html")], "no folder"),
        (["--out", str(tmp_path / ("x" * 300))], "cannot be read or written: File name too long"),
    ):
        assert main(["report", str(folder), *argv]) == 2
        captured = capsys.readouterr()
        assert words in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert default.read_text() == "mine"
    out = tmp_path / "new.html"
    assert main(["report", str(folder), "--out", str(out)]) == 0 and page.MARK in out.read_bytes()
    with pytest.raises(UserError, match="new.html exists"):
        run_report.write(folder, out)
    default.unlink()
    default.symlink_to(out)
    with pytest.raises(UserError, match="report.html exists"):
        run_report.write(folder)


def test_differences_from_the_nearest_config() -> None:
    overrides = ["optimizer.schedule.value=0.25", "tasks.batch_size=5", "run.keep=7"]
    name, rows = run_report.compared(config(*overrides))
    assert name == "celo2:fast_digits"
    default = load("celo2:fast_digits")
    there = [default.optimizer.schedule.value, default.run.keep, default.tasks.batch_size]
    keys = ["optimizer.schedule.value", "run.keep", "tasks.batch_size"]
    assert sorted(rows) == [(k, a, str(b)) for k, a, b in zip(keys, ("0.25", "7", "5"), there, strict=True)]
    assert run_report.compared(run_files.resolve(load("velo_s:fast_velo"))) == ("velo_s:fast_velo", [])


def test_many_families_and_rows_stay_small(tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    families = generator.normal(size=(20_000, 30)).round(4)
    rows = [
        made_run.row(i + 1, float(values[0]), BEGIN + i // 10)
        | {"family_loss": {f"f{k}": float(v) for k, v in enumerate(values)}}
        for i, values in enumerate(families)
    ]
    folder = made_run.make(tmp_path / "a", rows, config=config())
    assert run_report.write(folder).stat().st_size < 1_000_000
    assert "The first 12 of 30." in (folder / "report.html").read_text()


def test_a_real_run(real_run: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Watch it, report it, and use theta by the lines that the report shows."""
    folder = real_run[0]
    assert main(["watch", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "it's  finished" in shown.replace("\n", "  ") and "iteration 3 of 3 (100.0%)" in shown
    assert "digits" in shown and main(["report", str(folder)]) == 0
    text = (folder / "report.html").read_text()
    page = Page(text)
    self_contained(text)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert f"last 3 meta-iterations is {np.mean([row['loss'] for row in rows]):.4g}" in text
    assert text.count("<svg") == 3 and "accumulators" in text and f"jax {jax.__version__}" in text
    usage = next(words for words in page.words["pre"] if words.startswith("import json"))
    used: dict[str, Any] = {}
    exec(usage, used)
    theta, saved = used["optimizer"].theta, load_theta(folder)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), theta, saved))
    params = {"w": jnp.ones((4, 3))}
    updates, _ = used["tx"].update(params, used["tx"].init(params), params)
    assert bool(jnp.isfinite(updates["w"]).all())
