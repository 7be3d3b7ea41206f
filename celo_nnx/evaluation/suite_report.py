"""The report of an evaluation, under way or over: one HTML file, and the scores as CSV beside it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import markupsafe
import numpy as np

from celo_nnx.errors import UserError, printable
from celo_nnx.evaluation import page, plots, suite_csv, suite_plots
from celo_nnx.evaluation.results import ADAM, Entry, Results, TaskResult, load_results
from celo_nnx.evaluation.scores import LENGTHS, LONGEST, SMOOTHING
from celo_nnx.evaluation.standings import Standing, standings
from celo_nnx.evaluation.suite_words import (
    counted,
    ends,
    letters,
    losses,
    middle,
    shown,
    speedups,
    state,
    verdict,
)
from celo_nnx.files import told

FILE_NAME = "report.html"
TABLES = {"scores": suite_csv.RUNS, "summary": suite_csv.OPTIMIZERS}
OPEN = 6  # tasks up to which their details are shown at once
TINT = 0.55  # opacity of a cell of the table by task whose score is 4 times Adam's, or a quarter


def write(folder: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Writes the report of an evaluation, whatever its state, with ``scores.csv`` and ``summary.csv``.

    Args:
      folder: of ``celo-nnx evaluate``.
      out: a new file, whose name the CSV files then begin with; by default ``report.html`` in the folder,
        where newer files replace older.

    Returns:
      The page's path.

    Raises:
      UserError: the folder is not that of an evaluation, or a file would be overwritten.

    Example:
      >>> write("runs/smoke")  # doctest: +SKIP
      PosixPath('runs/smoke/report.html')
    """
    default = Path(folder) / FILE_NAME
    path = default if out is None else Path(out)
    before = "" if path.absolute() == default.absolute() else f"{path.stem}-"
    runs, optimizers = (path.with_name(f"{before}{name}.csv") for name in TABLES)
    with told(path):
        page.refuse_foreign(path, default)
        for csv, (name, columns) in zip((runs, optimizers), TABLES.items(), strict=True):
            page.refuse_foreign(csv, default.with_name(f"{name}.csv"), suite_csv.mark(columns))
    results = load_results(folder)
    ranking = standings(results)
    try:
        text = html(results, ranking)
    except RecursionError:
        raise UserError(f"{folder}: a config is nested too deeply to be shown") from None
    with told(path):
        page.write(runs, suite_csv.runs(results))
        page.write(optimizers, suite_csv.optimizers(results, ranking))
        return page.write(path, text)


def html(results: Results, ranking: Sequence[Standing]) -> str:
    """Returns the page.

    Args:
      results: as they are by now.
      ranking: the optimizers by their scores, none where there are none.
    """
    suite, labels = results.evaluation.suite, results.evaluation.labels
    missing = results.missing()
    started = [task for task in results.tasks if task.entries]
    warnings = {task.name: warned(task) for task in started}
    made_with, rows = versions(started), [score_row(standing) for standing in ranking]
    return page.render(
        "suite_report.html",
        title=f"Evaluation {suite['name']}",
        summary=[*verdict(results, ranking), *state(results, missing, made_with)],
        warned=sum(map(len, warnings.values())),
        skipped=[(name, printable(reason)) for name, reason in results.evaluation.skipped.items()],
        missing=missing,
        suite=suite,
        optimizers=[
            (o["label"], printable(o["about"]) if o["about"] else "") for o in results.evaluation.optimizers
        ],
        notes={e.note for standing in ranking for e in standing.score.values() if e.note},
        rows=rows,
        figures=figures(results, ranking),
        strips=strips(started, labels),
        tasks=[task_section(task, labels, warnings[task.name], i) for i, task in enumerate(started)],
        open=len(started) <= OPEN,
        bands=suite_plots.BANDS,
        finished=len(results.finished()),
        smoothing=SMOOTHING,
        longest=LONGEST,
        lengths=[f"{times:.3g}" for times in LENGTHS[suite["schedule"]]],
        command=printable(results.evaluation.command) if results.evaluation.command else "",
        versions={name: "; ".join(values) for name, values in made_with.items()},
        own=next((row["speedup"] for row in rows if row["name"] == ADAM), ""),
    )


def score_row(standing: Standing) -> dict[str, Any]:
    """One row of the score table, as text."""
    ratio = lambda x: f"{x:.3g} ×" if math.isfinite(x) else "-"  # noqa: E731
    at_least = "≥ " if standing.bounded else ""
    improvement, faster = standing.improvement, standing.faster
    return {
        "name": standing.label,
        "score": shown(standing.score["iqm"].value),
        "score_ends": ends(standing.score["iqm"]),
        "median": shown(standing.score["median"].value),
        "mean": shown(standing.score["mean"].value),
        "speedup": at_least + shown(standing.speedup["iqm"].value),
        "speedup_ends": ends(standing.speedup["iqm"]),
        "faster": "-" if faster is None else at_least + shown(faster.value),
        "faster_ends": "" if faster is None else ends(faster),
        "at_least": f"{100 * standing.at_least / standing.runs:.0f} %",
        "improvement": "-" if improvement is None else f"{improvement.value:.2f}",
        "improvement_ends": "" if improvement is None else ends(improvement),
        "diverged": f"{standing.diverged} of {standing.runs}",
        "step_time": ratio(standing.step_time),
        "state": ratio(standing.state),
    }


def figures(results: Results, ranking: Sequence[Standing]) -> dict[str, markupsafe.Markup]:
    """The figures of the aggregates, by name; none without scores."""
    if not ranking:
        return {}
    made = {"dots": suite_plots.dots_figure(ranking)}
    for what in ("score", "speedup"):
        made[what] = suite_plots.profile_figure(results, ranking, what)
    return {name: markupsafe.Markup(plots.to_svg(figure, name)) for name, figure in made.items()}


def strips(tasks: Sequence[TaskResult], labels: Sequence[str]) -> list[dict[str, Any]]:
    """For either score a table of medians over seeds, task by optimizer, tinted by their distance from 1."""
    out = []
    for what, title in (("score", "Final-loss score"), ("speedup", "Speedup")):
        rows = []
        for task in tasks:
            cells = [task.entries.get(label) for label in labels]
            if any(entry is not None and getattr(entry, what) is not None for entry in cells):
                rows.append((task.name, [tinted(entry, what) for entry in cells]))
        if rows:
            out.append({"title": title, "rows": rows})
    return out


def tinted(entry: Entry | None, what: str) -> tuple[str, str]:
    """A cell's text and its background; blue is above Adam, orange is below."""
    values = None if entry is None else getattr(entry, what)
    if entry is None or values is None:
        return "", ""
    median = float(np.median(values))
    distance = math.log(max(median, 1e-9)) / math.log(4.0)
    color = "47,125,225" if distance > 0 else "232,118,44"
    alpha = TINT * min(1.0, abs(distance))
    text = speedups(entry)[0] if what == "speedup" else shown(median)
    return text, f"background: rgba({color},{alpha:.2f})"


def task_section(task: TaskResult, labels: Sequence[str], warnings: Sequence[str], i: int) -> dict[str, Any]:
    """Everything on one task."""
    name = f"task{letters(i)}"
    curves = plots.to_svg(suite_plots.curves_figure(task, labels), f"{name}curves")
    rates = plots.to_svg(suite_plots.rates_figure(task, labels), f"{name}rates")
    entries = sorted(task.entries.items(), key=lambda item: item[1].tuned.median)
    sets = sorted({name for _, entry in entries for name in entry.training.held_out})
    return {
        "name": task.name,
        "floor": "" if task.floor is None else f"{task.floor:.6g}",
        "note": task.note,
        "warnings": warnings,
        "rows": [task_row(label, entry, sets) for label, entry in entries],
        "sets": sets,
        "costs": [cost_row(label, entry) for label, entry in entries],
        "curves": markupsafe.Markup(curves),
        "rates": markupsafe.Markup(rates),
        "config": json.dumps(next(iter(task.entries.values())).cell.config, indent=1),
    }


def task_row(label: str, entry: Entry, sets: Sequence[str]) -> dict[str, Any]:
    """One optimizer on one task, as text."""
    other = entry.validation
    validation = []
    if other is not None:
        validation = [shown(other.learning_rate), losses(other.final)]
        validation += [losses(other.held_out[name]) if name in other.held_out else "-" for name in sets]
    score = ("-", "") if entry.score is None else middle(entry.score)
    return {
        "name": label,
        "rate": shown(entry.training.learning_rate),
        "final": middle(entry.training.final),
        "score": score,
        "speedup": ("-", "") if entry.speedup is None else speedups(entry),
        "validation": validation or ["-"] * (2 + len(sets)),
    }


def cost_row(label: str, entry: Entry) -> list[str]:
    """What one optimizer's runs took, as text."""
    measured, dash = entry.cell.measured, "-"

    def found(name: str, format: str, scale: float = 1.0) -> str:
        return format.format(scale * measured[name]) if name in measured else dash

    state = dash
    if measured.get("parameters", 0) > 0 and "state_bytes" in measured:
        state = f"{measured['state_bytes'] / measured['parameters']:.3g}"
    times = [found("step_seconds", "{:.3g} ms", 1e3), found("compile_seconds", "{:.3g} s")]
    return [label, *times, found("seconds", "{:.3g} s"), state, found("temp_bytes", "{:,.3g} MB", 1e-6)]


def warned(task: TaskResult) -> list[str]:
    """What is wrong with the runs of a task, in sentences."""
    out = [f"{label}: {printable(words)}" for label, e in task.entries.items() for words in e.cell.warnings]
    for cell in task.longer:
        out += [f"{cell.optimizer} for {cell.steps} steps: {printable(words)}" for words in cell.warnings]
    for label, entry in task.entries.items():
        if count := int((~np.isfinite(entry.training.final)).sum()):
            seeds = len(entry.training.final)
            out.append(f"{label}: {count} of {counted(seeds, 'run')} diverged at the chosen learning rate")
    return out


def versions(tasks: Sequence[TaskResult]) -> dict[str, list[str]]:
    """Libraries and machines that made the cells, by name; several values where they differ."""
    found: dict[str, dict[str, None]] = {}
    cells = [entry.cell for task in tasks for entry in task.entries.values()]
    for cell in [*cells, *(cell for task in tasks for cell in task.longer)]:
        for name, version in cell.versions.items():
            found.setdefault(name, {})[version] = None
    return {printable(name): [printable(value) for value in values] for name, values in found.items()}
