"""The figures of an evaluation, in the style of :mod:`celo_nnx.evaluation.plots`.

An optimizer has the colour and the dashes of its place in the evaluation's list, in every figure.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from celo_nnx.evaluation.aggregates import profile
from celo_nnx.evaluation.plots import (
    INK,
    draw_rates,
    fit_y,
    label_axes,
    labelled_axes,
    legend_above,
    legible,
    plain_numbers,
    positive,
    rates_scales,
    style,
)
from celo_nnx.evaluation.results import ADAM, Results, TaskResult
from celo_nnx.evaluation.standings import Standing

BANDS = 8  # the most optimizers whose ranges and intervals are drawn
COLUMNS = 3  # of a legend
THRESHOLDS = 161  # of a performance profile


def curves_figure(task: TaskResult, labels: Sequence[str]) -> Figure:
    """Smoothed training losses at the tuned rates: the median seed, and the range of up to :data:`BANDS`.

    Losses are counted from the task's floor where it is known and not 0.

    Args:
      task: with entries.
      labels: all of the evaluation, in order.
    """
    figure, axes = _axes("step", f"training loss{_above(task)}", len(task.entries), 3.3)
    shown, starts = [], []
    for label, entry in task.entries.items():
        color, dashes = style(labels.index(label))
        losses = entry.course - (task.floor or 0.0)
        losses = np.where(np.isfinite(losses), losses, np.inf)
        if task.floor is not None:
            losses = np.where(losses > 0, losses, np.inf)
        median = _holes(np.median(losses, axis=0))
        name = legible(f"{_short(label)} (lr {entry.training.learning_rate:.2g})")
        axes.plot(entry.at, median, color=color, linestyle=dashes, label=name)
        if len(task.entries) <= BANDS:
            low = _holes(losses.min(axis=0))
            high = np.where(np.isfinite(losses), losses, -np.inf).max(axis=0)
            band = dict(color=color, alpha=0.16, linewidth=0)
            axes.fill_between(entry.at, low, np.where(np.isfinite(high), high, np.nan), **band)
        known = median[np.isfinite(median)]
        shown.append(known)
        starts += known[:1].tolist()
    values = np.concatenate(shown)
    # What grows beyond its start by much may leave the picture.
    top = max([abs(x) for x in starts], default=1.0)
    fit_y(axes, values[values <= 2 * top])
    legend_above(axes, COLUMNS)
    return figure


def rates_figure(task: TaskResult, labels: Sequence[str]) -> Figure:
    """Final losses against learning rates, as far as they are not far above the start of training.

    Args:
      task: with entries.
      labels: all of the evaluation, in order.
    """
    figure, axes = _axes("learning rate", f"final loss{_above(task)}", len(task.entries), 2.5)
    rates_scales(axes)
    floor, tops, lows = task.floor or 0.0, [], []
    for label, entry in task.entries.items():
        with np.errstate(invalid="ignore"):
            tuned = dataclasses.replace(
                entry.tuned, final=entry.tuned.final - floor, medians=entry.tuned.medians - floor
            )
        draw_rates(axes, tuned, _short(label), labels.index(label))
        best = positive(np.array([tuned.median, float(np.median(entry.course[:, 0])) - floor]))
        tops.append(best)
        lows.append(positive(tuned.final).ravel())
    low, top = (np.concatenate(values) for values in (lows, tops))
    if np.isfinite(low).any() and np.isfinite(top).any():
        axes.set_ylim(np.nanmin(low) / 1.3, 2 * np.nanmax(top))
    return figure


def profile_figure(results: Results, ranking: Sequence[Standing], what: str) -> Figure:
    """Performance profiles: which part of all runs scores above each threshold, with intervals.

    Args:
      results: with finished tasks.
      ranking: the optimizers.
      what: ``score`` or ``speedup``.
    """
    words = {"score": "final-loss score", "speedup": "speedup"}[what]
    figure, axes = _axes(f"{words} τ", "share of runs above τ", len(ranking), 3.3)
    ranking = sorted(ranking, key=lambda standing: standing.place)
    matrices = [results.matrix(standing.label, what) for standing in ranking]
    most = float(np.percentile(np.concatenate([m.ravel() for m in matrices]), 95))
    thresholds = np.linspace(0.0, min(max(1.1 * most, 1.5), 10.0), THRESHOLDS)
    for standing, matrix in zip(ranking, matrices, strict=True):
        color, dashes = style(standing.place)
        found = profile(matrix, thresholds)
        label = legible(_short(standing.label))
        axes.plot(thresholds, found.value, color=color, linestyle=dashes, label=label)
        if found.low is not None and len(ranking) <= BANDS:
            axes.fill_between(thresholds, found.low, found.high, color=color, alpha=0.14, linewidth=0)
    axes.axvline(1.0, color=INK, alpha=0.35, linewidth=0.8)
    axes.set_xlim(0.0, thresholds[-1])
    axes.set_ylim(-0.02, 1.02)
    legend_above(axes, COLUMNS)
    return figure


def dots_figure(ranking: Sequence[Standing]) -> Figure:
    """The IQMs of both scores with their intervals, an optimizer a row, the best on top."""
    figure = Figure(figsize=(7.2, 0.9 + 0.3 * len(ranking)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    places = -np.arange(len(ranking))
    for axes, what, words in zip(
        panels, ("score", "speedup"), ("final-loss score (IQM)", "speedup (IQM)"), strict=True
    ):
        label_axes(axes, words, "")
        found = [getattr(standing, what)["iqm"] for standing in ranking]
        ends = [x for e in found for x in (e.low, e.value, e.high) if x is not None]
        if min(ends) > 0 and max(ends) >= 10 * min(ends):
            axes.set_xscale("log")
            plain_numbers(axes.xaxis)
        own = next((e.value for s, e in zip(ranking, found, strict=True) if s.label == ADAM), 1.0)
        axes.axvline(own, color=INK, alpha=0.35, linewidth=0.8)
        for standing, estimate, y in zip(ranking, found, places, strict=True):
            _dot(axes, standing, estimate.value, estimate.low, estimate.high, y)
        axes.grid(False, axis="y")
    panels[0].set_ylim(-len(ranking) + 0.4, 0.6)
    names = [_short(standing.label) for standing in ranking]
    panels[0].set_yticks(places, names, parse_math=False)
    panels[1].tick_params(axis="y", length=0)
    return figure


def _dot(axes: Axes, standing: Standing, value: float, low: float | None, high: float | None, y: int) -> None:
    color = style(standing.place)[0]
    axes.plot([value], [y], "o", color=color, markersize=6)
    if low is not None:
        axes.plot([low, high], [y, y], color=color, linewidth=2.4, alpha=0.55, solid_capstyle="butt")


def _axes(x: str, y: str, entries: int, height: float) -> tuple[Figure, Axes]:
    """Axes that stay of one height however many lines their legend has."""
    return labelled_axes(x, y, height + 0.21 * math.ceil(entries / COLUMNS))


def _above(task: TaskResult) -> str:
    return f" above {task.floor:.4g}" if task.floor else ""


def _holes(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


def _short(label: str) -> str:
    return label if len(label) <= 28 else f"{label[:27]}…"
