"""The report of a grid, under way or over: one HTML file and two CSV files. Everything comes from files."""

from __future__ import annotations

import csv
import io
import math
import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import markupsafe
import numpy as np

from celo_nnx.errors import UserError, printable
from celo_nnx.evaluation import page, plots
from celo_nnx.evaluation.plots import Line
from celo_nnx.files import told
from celo_nnx.grids.effect_plot import effects_figure
from celo_nnx.grids.effects import Effect, effects, key
from celo_nnx.grids.plan import differing, scales
from celo_nnx.grids.status import progress
from celo_nnx.grids.store import Entry, GridFolder, read_grid
from celo_nnx.meta.runlog import clock
from celo_nnx.run_folder import RunFolder
from celo_nnx.series import SHARE, even, running_mean

FILE_NAME = "report.html"
CELLS, EFFECTS, PICTURE = "cells.csv", "effects.csv", "effects.svg"
POINTS = 400  # of a curve
CURVES = 12  # in one picture
LONGEST = 200_000  # meta-iterations of a curve that are averaged over cells
# What is compared, by name in the results: its words, and whether less is better.
NUMBERS = {
    "score": ("final-loss score", False),
    "speedup": ("speedup", False),
    "meta_loss": ("meta-loss", True),
}
WORDS = {name: words for name, (words, _) in NUMBERS.items()}
FURTHER = "further cell"  # stands where others have their axis
CELL_COLUMNS = ("id", "state", "seed", "label")
RESULT_COLUMNS = ("iterations", "meta_loss", "first_meta_loss", "score", "speedup", "nonfinite")
COST_COLUMNS = ("train_seconds", "evaluation_seconds", "starts")
EFFECT_COLUMNS = ("number", "axis", "label", "reference", "mean", "effect", "low", "high", "seeds")
EFFECT_COLUMNS += ("combinations", "missing_pairs")


def write(folder: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Writes the report of a grid, whatever its state, with CSV files and ``effects.svg`` beside it.

    Args:
      folder: of ``celo-nnx grid run``.
      out: a new file; by default ``report.html`` in the folder, where a newer report replaces an older. The
        files beside another one bear its name before theirs.

    Returns:
      The page's path.

    Raises:
      UserError: the folder is not that of a grid, or a file would be overwritten.

    Example:
      >>> write("runs/mlp_size")  # doctest: +SKIP
      PosixPath('runs/mlp_size/report.html')
    """
    grid = read_grid(folder)
    default = grid.path / FILE_NAME
    path = default if out is None else Path(out)
    before = "" if out is None else f"{path.stem}-"
    others = {name: path.with_name(before + name) for name in (CELLS, EFFECTS, PICTURE)}
    begins = {CELLS: ",".join(CELL_COLUMNS), EFFECTS: ",".join(EFFECT_COLUMNS[:4]), PICTURE: "<?xml"}
    with told(path):
        page.refuse_foreign(path, default)
        for name, other in others.items():
            page.refuse_foreign(other, grid.path / name, begins[name].encode())
    rows = [Row(entry) for entry in grid.cells]
    found = compared(grid, rows)
    text = html(grid, rows, found)
    with told(path):
        page.write(others[CELLS], cells_csv(grid, rows))
        page.write(others[EFFECTS], effects_csv(found))
        if picture := effects_figure(found, WORDS):
            page.write(others[PICTURE], plots.to_svg(picture, "effects", standalone=True))
        return page.write(path, text)


class Row:
    """A cell as it is by now.

    Args:
      entry: of ``grid.json``.

    Attributes:
      entry: the same.
      state: of its folder.
      outcome, cost: of its result; empty without one.
      failure: why its last attempt failed, or that what it has left is damaged.
      config: resolved; empty where it cannot be read.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry, self.state = entry, entry.folder.state()
        self.outcome: dict[str, Any] = {}
        self.cost: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.failure = entry.folder.failure() if self.state != "done" else ""
        try:
            result = entry.folder.result() or {}
            self.outcome, self.cost = result.get("outcome", {}), result.get("cost", {})
            if self.state != "waiting":
                self.config = entry.folder.read()["config"]
        except UserError as error:
            self.failure = str(error)

    def number(self, name: str) -> float:
        """A number of the outcome; NaN where there is none."""
        value = self.outcome.get(name)
        return float(value) if type(value) in (int, float) else math.nan


def compared(grid: GridFolder, rows: Sequence[Row]) -> dict[str, list[Effect]]:
    """Returns the effects of all axes on every number that there is, then those of the further cells.

    A further cell is compared with the cell of all first labels; in a grid without axes, with the first one.
    """
    product = [row for row in rows if row.entry.labels]
    planned = [key(row.entry.labels, row.entry.seed) for row in product]
    first = {axis: labels[0] for axis, labels in grid.axes.items()}
    beside = [row for row in rows if row.entry.extra or row.entry.labels == first]
    places = [key({FURTHER: row.entry.variant}, row.entry.seed) for row in beside]
    names = [" ".join(f"{axis}={label}" for axis, label in first.items())] if first else []
    names += [row.entry.extra for row in rows if row.entry.extra]
    further = {FURTHER: list(dict.fromkeys(names))} if any(row.entry.extra for row in rows) else {}
    out = {}
    for name in NUMBERS:
        numbers = {k: row.number(name) for k, row in zip(planned, product, strict=True)}
        others = {k: row.number(name) for k, row in zip(places, beside, strict=True)}
        if any(math.isfinite(value) for value in (*numbers.values(), *others.values())):
            out[name] = effects(grid.axes, planned, numbers) + effects(further, places, others)
    return out


def html(grid: GridFolder, rows: Sequence[Row], found: dict[str, list[Effect]]) -> str:
    """Returns the page."""
    names = [name for name in NUMBERS if any(math.isfinite(row.number(name)) for row in rows)]
    choice = best(rows)
    return page.render(
        "grid_report.html",
        title=f"Grid {printable(grid.name)}",
        summary=summary(grid, rows, found),
        notes=notes(rows),
        effects=[
            {"number": NUMBERS[name][0], "rows": [effect_row(e, name in judged(rows)) for e in some]}
            for name, some in found.items()
        ],
        figures=effect_pictures(found) + figures(grid, rows),
        axes=list(grid.axes),
        extras=any(row.entry.extra for row in rows),
        numbers=[NUMBERS[name][0] for name in names],
        cells=[cell_row(grid, row, names) for row in rows],
        failures=[(row.entry.name, row.entry.id, row.failure) for row in rows if row.failure],
        costs=costs(rows),
        best=best_command(grid, choice) if choice else "",
        best_name=choice[0].entry.variant if choice else "",
        best_by=choice[1] if choice else "",
        command=grid.command,
        base=grid.base,
        suite=grid.suite,
    )


def summary(grid: GridFolder, rows: Sequence[Row], found: dict[str, list[Effect]]) -> list[str]:
    """The question, how far the grid is, and the effects that stand out, in sentences."""
    states = [row.state for row in rows]
    text = f"{states.count('done')} of {len(rows)} cells are done"
    text += "".join(f", {n} {state}" for state in ("failed", "damaged") if (n := states.count(state))) + "."
    out = [grid.question, text]
    if shown := [name for name in judged(rows) if name in found]:
        name, some = shown[0], found[shown[0]]
        clear = [e for e in some if e.half_width < abs(e.effect)]
        if clear:
            largest = max(clear, key=lambda e: abs(e.effect))
            better = (largest.effect < 0) == NUMBERS[name][1]
            out.append(
                f"The largest clear effect on the {NUMBERS[name][0]}: {largest.axis} {largest.label} instead "
                f"of {largest.reference} {largest.effect:+.3g} ({'better' if better else 'worse'}), "
                f"95 % interval {largest.effect - largest.half_width:.3g} to "
                f"{largest.effect + largest.half_width:.3g} over {largest.seeds} seeds."
            )
        elif any(math.isfinite(e.half_width) for e in some):
            out.append(f"No label's effect on the {NUMBERS[name][0]} is clear of zero at these seeds.")
        elif any(math.isfinite(e.effect) for e in some):
            out.append("There are no intervals: it takes at least two seeds.")
    return out


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader must know before comparing."""
    out = []
    if found := scales(differ(rows)):
        out.append(
            f"Cells differ in {', '.join(found)}: their meta-losses are means over other inner steps, "
            "perturbations or tasks and not of one scale, so that no effect on them is called clear and no "
            "variant the best. Compare them by what a suite says."
        )
    if "run.iterations" in differ(rows):
        out.append("Cells differ in run.iterations.")
    return out


def differ(rows: Sequence[Row]) -> list[str]:
    """Returns in which keys the configs of cells that have begun differ."""
    configs = [row.config for row in rows if row.config]
    return differing(configs) if configs else []


def judged(rows: Sequence[Row]) -> list[str]:
    """Returns the numbers by which one cell may be called better than another."""
    return [name for name in NUMBERS if name != "meta_loss" or not scales(differ(rows))]


def effect_row(effect: Effect, judge: bool) -> dict[str, Any]:
    """One row of the table of effects, as text; bold where it is clear and may be judged."""
    low, high = effect.effect - effect.half_width, effect.effect + effect.half_width
    first = effect.label == effect.reference
    return {
        "axis": effect.axis,
        "label": effect.label,
        "mean": text(effect.mean),
        "effect": "compared with" if first else signed(effect.effect),
        "ends": f"{signed(low)} to {signed(high)}" if math.isfinite(low) and not first else "",
        "bold": judge and not first and effect.half_width < abs(effect.effect),
        "pairs": f"{effect.seeds} x {effect.combinations}",
        "missing": effect.missing,
    }


def cell_row(grid: GridFolder, row: Row, names: Sequence[str]) -> dict[str, Any]:
    """One row of the table of cells, as text."""
    entry = row.entry
    seconds = row.cost.get("train_seconds", math.nan) + row.cost.get("evaluation_seconds", 0.0)
    return {
        "labels": [entry.labels.get(axis, "") for axis in grid.axes],
        "extra": entry.extra,
        "seed": entry.seed,
        "state": row.state,
        "iteration": f"{progress(entry.folder):,} of {entry.iterations:,}",
        "numbers": [text(row.number(name)) for name in names],
        "nonfinite": row.outcome.get("nonfinite", ""),
        "seconds": clock(seconds) if math.isfinite(seconds) else "-",
        "starts": entry.folder.starts(),
        "id": entry.id,
    }


def costs(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What the finished cells have cost."""
    training = sum(row.cost.get("train_seconds", 0.0) for row in rows)
    evaluation = sum(row.cost.get("evaluation_seconds", 0.0) for row in rows)
    iterations = sum(row.outcome.get("iterations", 0) for row in rows)
    out = [("Meta-iterations of finished cells", f"{iterations:,}"), ("Meta-training", clock(training))]
    out += [("Evaluation", clock(evaluation))] if evaluation else []
    return out + [("Processes started", str(sum(row.entry.folder.starts() for row in rows)))]


def best(rows: Sequence[Row]) -> tuple[Row, str] | None:
    """Returns the best variant by its mean over the seeds, and what by: of variants whose seeds all are done.

    Its row is that of its best seed; None where there is no such variant, or nothing to judge by.
    """
    name = next((n for n in judged(rows) if any(math.isfinite(row.number(n)) for row in rows)), None)
    if name is None:
        return None
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault((tuple(row.entry.labels.items()), row.entry.extra), []).append(row)
    sign = 1.0 if NUMBERS[name][1] else -1.0
    whole = [g for g in groups.values() if all(math.isfinite(row.number(name)) for row in g)]
    if not whole:
        return None
    chosen = min(whole, key=lambda g: sign * float(np.mean([row.number(name) for row in g])))
    by = f"{NUMBERS[name][0]}, mean over {len(chosen)} seed{'s' * (len(chosen) > 1)}"
    return min(chosen, key=lambda row: sign * row.number(name)), by


def best_command(grid: GridFolder, choice: tuple[Row, str]) -> str:
    """Returns the command line that meta-trains the best cell anew."""
    overrides = choice[0].entry.overrides
    return shlex.join(["celo-nnx", "train", grid.base, *overrides, "--run-dir", "runs/best"])


def effect_pictures(found: dict[str, list[Effect]]) -> list[dict[str, Any]]:
    """The effects, for the page; nothing where there are none."""
    figure = effects_figure(found, WORDS)
    if figure is None:
        return []
    caption = "Difference from each axis' first label (open), a further cell's from that of all of them, "
    caption += "paired, with Student's interval over the seeds."
    return [
        {"title": "Effects", "svg": markupsafe.Markup(plots.to_svg(figure, "effects")), "caption": caption}
    ]


def figures(grid: GridFolder, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Meta-loss curves: of the variants, and of every axis' labels over all of their cells."""
    curves = {id(row): curve(row) for row in rows}
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.entry.variant, []).append(row)
    pictures = {"Meta-loss of the variants": groups} if len(groups) <= CURVES else {}
    if len(grid.axes) > 1:
        for axis, labels in grid.axes.items():
            by_label = {x: [row for row in rows if row.entry.labels.get(axis) == x] for x in labels[:CURVES]}
            pictures[f"Meta-loss by {axis}"] = by_label
    out = []
    for title, named in pictures.items():
        lines = [line(name, [curves[id(row)] for row in some]) for name, some in named.items()]
        lines = [one for one in lines if np.isfinite(one.y).any()]
        if lines:
            svg = plots.to_svg(
                plots.course_figure(lines, "meta-loss"), f"curves{'abcdefghijkl'[len(out) % 12]}"
            )
            caption = "Mean over cells of each one's running mean, up to where every one of them has come."
            out.append({"title": title, "svg": markupsafe.Markup(svg), "caption": caption})
    return out


def curve(row: Row) -> np.ndarray:
    """Returns a cell's running mean of the meta-loss, of as many meta-iterations as it has logged."""
    try:
        losses = RunFolder(row.entry.folder.run_dir).metrics["loss"][:LONGEST]
    except UserError:
        return np.array([])
    return running_mean(losses, max(1, len(losses) // SHARE)) if len(losses) else losses


def line(name: str, curves: Sequence[np.ndarray]) -> Line:
    """Returns the mean of curves, those of cells that have begun."""
    begun = [values for values in curves if len(values)]
    if not begun:
        return Line(name, np.array([]), np.array([]))
    length = min(map(len, begun))
    values = np.mean([one[:length] for one in begun], axis=0)
    places = even(length, POINTS)
    return Line(printable(name)[:40], places + 1, values[places])


def cells_csv(grid: GridFolder, rows: Sequence[Row]) -> str:
    """Returns a row a cell; numbers in full, empty where there are none."""
    head = [*CELL_COLUMNS, *grid.axes, *RESULT_COLUMNS, *COST_COLUMNS, "failure"]
    body = []
    for row in rows:
        entry = row.entry
        cells = [entry.id, row.state, entry.seed, entry.extra]
        cells += [entry.labels.get(axis, "") for axis in grid.axes]
        cells += [row.outcome.get(name) for name in RESULT_COLUMNS]
        body.append([*cells, *(row.cost.get(name) for name in COST_COLUMNS), row.failure])
    return as_csv(head, body)


def effects_csv(found: dict[str, list[Effect]]) -> str:
    """Returns a row for every number and label; numbers in full, empty where there are none."""
    body = []
    for name, some in found.items():
        for e in some:
            numbers = [e.mean, e.effect, e.effect - e.half_width, e.effect + e.half_width]
            shown = [x if math.isfinite(x) else None for x in numbers]
            body.append([name, e.axis, e.label, e.reference, *shown, e.seeds, e.combinations, e.missing])
    return as_csv(EFFECT_COLUMNS, body)


def as_csv(head: Sequence[str], body: Iterable[Sequence[Any]]) -> str:
    """Returns CSV text."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(body)
    return file.getvalue()


def text(value: float) -> str:
    """A number to four digits, a dash for none."""
    return f"{value:.4g}" if math.isfinite(value) else "-"


def signed(value: float) -> str:
    """A difference to three digits with its sign, a dash for none.

    Example:
      >>> signed(0.12345), signed(float("nan"))
      ('+0.123', '-')
    """
    return f"{value:+.3g}" if math.isfinite(value) else "-"
