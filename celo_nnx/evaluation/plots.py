"""The report's figures as SVG text: readable on light and dark pages, no global matplotlib state."""

from __future__ import annotations

import dataclasses
import io
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from celo_nnx.evaluation.curves import Tuned

# Told apart by line style as well as by colour, and dark enough for white, light enough for black.
COLORS = ("#2f7de1", "#14a37f", "#e8762c", "#9460d8", "#d6407f", "#0f9fb5", "#a8842c", "#7d8794")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (9, 2)))
INK = "#010203"  # stands for the page's text colour; becomes currentColor in an inline figure
PAPER_INK = "#24292f"
# What matplotlib numbers in the ids of every figure from 1 on.
GROUPS = ("figure", "axes", "patch", "line2d", "text", "matplotlib.axis", "legend", "xtick", "ytick")
GROUPS += ("FillBetweenPolyCollection",)
SMOOTHED = 0.05  # the part of a run over which training losses are averaged for the eye


@dataclasses.dataclass(frozen=True)
class Method:
    """One optimizer's runs.

    Attributes:
      name: shown in legends and tables.
      losses: ``[n_lr, n_seeds, steps]``.
      tuned: the learning rate chosen from them.
      seconds: how long the runs took, compilation included.
    """

    name: str
    losses: np.ndarray
    tuned: Tuned
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class MetaCurve:
    """The course of meta-training.

    Attributes:
      iterations: ``[n]``.
      losses: meta-loss, ``[n]``.
      events: (iteration, what happened) pairs, such as an interruption.
    """

    iterations: np.ndarray
    losses: np.ndarray
    events: tuple[tuple[int, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Line:
    """A quantity over meta-iterations.

    Attributes:
      name: for the legend.
      x, y: ``[n]``; a value that is not finite is a hole.
      faint: thin and pale, in the colour of the next line that is not.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    faint: bool = False


def meta_figure(curve: MetaCurve) -> Figure:
    """The meta-loss with its running median, and the interruptions."""
    figure, axes = labelled_axes("meta-iteration", "meta-loss")
    losses = np.where(np.isfinite(curve.losses), curve.losses, np.nan)
    window = max(1, len(losses) // 25)
    axes.plot(curve.iterations, losses, color=COLORS[0], alpha=0.3, linewidth=0.7)
    label = f"median of {window} iterations"
    axes.plot(curve.iterations, _running(losses, window, np.nanmedian), color=COLORS[0], label=label)
    _events(axes, curve.events, curve.iterations[-1] if len(losses) else 0)
    legend_above(axes)
    return figure


def course_figure(lines: Sequence[Line], y: str, events: Sequence[tuple[int, str]] = ()) -> Figure:
    """Quantities over meta-iterations, on a logarithmic axis where they span a factor of ten or more.

    Faint lines have no legend entry, and their rarest extremes may leave the picture.

    Args:
      lines: what to draw.
      y: the axis' label.
      events: (iteration, what happened) pairs.
    """
    figure, axes = labelled_axes("meta-iteration", y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    named = 0
    shown = []
    for line in lines:
        color, dashes = style(named)
        values = np.where(np.isfinite(line.y), line.y, np.nan)
        known = values[np.isfinite(values)]
        if line.faint:
            axes.plot(line.x, values, color=color, alpha=0.3, linewidth=0.7)
            known = np.percentile(known, (1, 99)) if len(known) else known
        else:
            label = legible(line.name)
            axes.plot(line.x, values, color=color, linestyle=dashes, label=label)
            named += 1
        shown.append(known)
    fit_y(axes, np.concatenate(shown) if shown else np.array([]))
    _events(axes, events, max((line.x[-1] for line in lines if len(line.x)), default=0))
    if named > 1 or any(line.faint for line in lines):
        legend_above(axes)
    return figure


def fit_y(axes: Axes, values: np.ndarray) -> None:
    """Fits the y axis to values, with a margin."""
    if not len(values):
        return
    low, high = float(values.min()), float(values.max())
    if low > 0 and high >= 10 * low:
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)
        axes.set_ylim(low / 1.1, high * 1.1)
    else:
        # Differences in the last digits are no course.
        margin = max(0.05 * (high - low), 0.005 * abs(high)) or 1.0
        axes.set_ylim(low - margin, high + margin)
        axes.ticklabel_format(axis="y", useOffset=False)


def _events(axes: Axes, events: Sequence[tuple[int, str]], end: float) -> None:
    """Marks events with dashed lines and their words, one below the other."""
    for i, (iteration, what) in enumerate(events):
        axes.axvline(iteration, color=COLORS[2], linewidth=1.2, linestyle=(0, (3, 2)))
        place = dict(xy=(iteration, 0.97 - 0.09 * i), xycoords=("data", "axes fraction"))
        offset, side = ((-5, 0), "right") if iteration > 0.6 * end else ((5, 0), "left")
        place |= dict(xytext=offset, textcoords="offset points", ha=side, va="top", fontsize=9)
        axes.annotate(what, **place, color=INK, parse_math=False)


def training_figure(methods: Sequence[Method]) -> Figure:
    """Training loss at each method's best learning rate: the median seed, and the range of all seeds."""
    figure, axes = labelled_axes("step", "training loss")
    axes.set_yscale("log")
    plain_numbers(axes.yaxis)
    for i, method in enumerate(methods):
        color, line = style(i)
        losses = method.losses[method.tuned.best].astype(np.float64)
        window = max(1, round(losses.shape[-1] * SMOOTHED))
        smooth = np.stack([_running(row, window, np.mean) for row in losses])
        steps = np.arange(1, losses.shape[-1] + 1)
        alive = np.where(np.isfinite(smooth), smooth, np.nan)
        label = legible(f"{method.name} (lr {method.tuned.learning_rate:.2g})")
        axes.plot(steps, positive(np.median(smooth, axis=0)), color=color, linestyle=line, label=label)
        axes.fill_between(steps, alive.min(axis=0), alive.max(axis=0), color=color, alpha=0.16, linewidth=0)
    legend_above(axes)
    return figure


def sensitivity_figure(methods: Sequence[Method]) -> Figure:
    """Final loss against learning rate: medians as lines, seeds as points, the best ringed."""
    figure, axes = labelled_axes("learning rate", "final training loss")
    rates_scales(axes)
    for i, method in enumerate(methods):
        draw_rates(axes, method.tuned, method.name, i)
    legend_above(axes)
    return figure


def rates_scales(axes: Axes) -> None:
    """Makes both axes logarithmic."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_numbers(axes.xaxis)
    plain_numbers(axes.yaxis)


def draw_rates(axes: Axes, tuned: Tuned, name: str, i: int) -> None:
    """Draws final losses against learning rates as the ``i``-th of a picture."""
    color, line = style(i)
    rates, label = tuned.learning_rates, legible(name)
    axes.plot(rates, positive(tuned.medians), color=color, linestyle=line, label=label)
    grid = np.broadcast_to(rates[:, None], tuned.final.shape)
    axes.plot(grid.ravel(), positive(tuned.final).ravel(), ".", color=color, alpha=0.55, markersize=5, mew=0)
    ring = dict(markersize=9, markerfacecolor="none", markeredgecolor=color, markeredgewidth=1.6)
    axes.plot([tuned.learning_rate], positive(np.array([tuned.median])), "o", **ring)


def to_svg(figure: Figure, name: str, *, standalone: bool = False) -> str:
    """Renders a figure.

    Args:
      figure: from one of the functions above.
      name: seeds the ids inside, so that several figures can share a page; lower-case letters.
      standalone: a picture of its own, on white paper, instead of one that takes the page's text colour.

    Returns:
      The ``<svg>`` element; for a standalone one, a whole SVG file.
    """
    options = {"svg.hashsalt": name, "svg.fonttype": "none"}
    with matplotlib.rc_context(options), warnings.catch_warnings():
        # Text stays text, so that it does not matter which glyphs matplotlib's own font has.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        if standalone:
            figure.patch.set_facecolor("#ffffff")
        else:
            figure.patch.set_alpha(0.0)
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    text = file.getvalue().replace(INK, PAPER_INK if standalone else "currentColor")
    for kind in GROUPS:
        text = text.replace(f'id="{kind}_', f'id="{name}-{kind}_')
    return text if standalone else text[text.index("<svg") :]


def labelled_axes(x: str, y: str, height: float = 3.7) -> tuple[Figure, Axes]:
    """An empty figure with labelled axes, drawn in the placeholder ink."""
    figure = Figure(figsize=(7.2, height), layout="constrained")
    axes = figure.subplots()
    label_axes(axes, x, y)
    return figure, axes


def label_axes(axes: Axes, x: str, y: str) -> None:
    """Labels axes and draws them in the placeholder ink."""
    axes.set_facecolor("none")
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.tick_params(which="both", colors=INK, labelsize=9)
    axes.grid(True, which="major", color=INK, alpha=0.12, linewidth=0.8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)


class _Plain(LogFormatter):
    """Numbers such as 0.02 at the ticks that matplotlib would label."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def plain_numbers(axis: Axis) -> None:
    """Labels a logarithmic axis with plain numbers, which also takes half the time of powers of ten."""
    axis.set_major_formatter(_Plain())
    axis.set_minor_formatter(_Plain())


def legend_above(axes: Axes, columns: int = 2) -> None:
    """A legend above the axes, where it hides no data."""
    entries = axes.get_legend_handles_labels()[1]
    legend = axes.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=min(columns, max(1, len(entries))),
        frameon=False,
        labelcolor=INK,
        fontsize=9,
        handlelength=2.6,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # names are names, dollar signs too


def style(i: int) -> tuple[str, Any]:
    """The (colour, dashes) of the ``i``-th line of a picture; the first 40 differ.

    Example:
      >>> len({style(i) for i in range(40)}), style(0)
      (40, ('#2f7de1', '-'))
    """
    return COLORS[i % len(COLORS)], DASHES[(i + i // len(COLORS)) % len(DASHES)]


def legible(name: str) -> str:
    """A name as a legend takes it: one that begins with an underscore would be none."""
    return f"\u200b{name}" if name.startswith("_") else name


def positive(values: np.ndarray) -> np.ndarray:
    """NaN, which matplotlib leaves out, wherever a value is not finite or not positive."""
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _running(values: np.ndarray, window: int, statistic: object) -> np.ndarray:
    """A trailing running statistic, over fewer values at the start; NaN where there is none."""
    windows = (values[max(0, i - window + 1) : i + 1] for i in range(len(values)))
    return np.array([statistic(w) if not np.all(np.isnan(w)) else np.nan for w in windows])
