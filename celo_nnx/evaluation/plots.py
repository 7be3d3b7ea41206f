"""The report's figures as SVG text: readable on light and dark pages, no global matplotlib state."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from celo_nnx.evaluation.curves import Tuned

# Told apart by line style as well as by colour, and dark enough for white, light enough for black.
STYLES = (
    ("#2f7de1", "-"),
    ("#14a37f", (0, (5, 1.5))),
    ("#e8762c", (0, (1, 1))),
    ("#9460d8", (0, (4, 1, 1, 1))),
)
INK = "#010203"  # stands for the page's text colour; becomes currentColor in an inline figure
PAPER_INK = "#24292f"
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


def meta_figure(curve: MetaCurve) -> Figure:
    """The meta-loss with its running median, and the interruptions."""
    figure, axes = _axes("meta-iteration", "meta-loss")
    losses = np.where(np.isfinite(curve.losses), curve.losses, np.nan)
    window = max(1, len(losses) // 25)
    axes.plot(curve.iterations, losses, color=STYLES[0][0], alpha=0.3, linewidth=0.7)
    label = f"median of {window} iterations"
    axes.plot(curve.iterations, _running(losses, window, np.nanmedian), color=STYLES[0][0], label=label)
    for i, (iteration, what) in enumerate(curve.events):
        axes.axvline(iteration, color=STYLES[2][0], linewidth=1.2, linestyle=(0, (3, 2)))
        place = dict(xy=(iteration, 0.97 - 0.09 * i), xycoords=("data", "axes fraction"))
        right = len(losses) > 0 and iteration > 0.6 * curve.iterations[-1]
        offset, side = ((-5, 0), "right") if right else ((5, 0), "left")
        axes.annotate(
            what, **place, xytext=offset, textcoords="offset points", ha=side, va="top", color=INK, fontsize=9
        )
    _legend(axes)
    return figure


def training_figure(methods: Sequence[Method]) -> Figure:
    """Training loss at each method's best learning rate: the median seed, and the range of all seeds."""
    figure, axes = _axes("step", "training loss")
    axes.set_yscale("log")
    for method, (color, line) in zip(methods, _styles(methods), strict=True):
        losses = method.losses[method.tuned.best].astype(np.float64)
        window = max(1, round(losses.shape[-1] * SMOOTHED))
        smooth = np.stack([_running(row, window, np.mean) for row in losses])
        steps = np.arange(1, losses.shape[-1] + 1)
        alive = np.where(np.isfinite(smooth), smooth, np.nan)
        label = f"{method.name} (lr {method.tuned.learning_rate:.2g})"
        axes.plot(steps, _finite(np.median(smooth, axis=0)), color=color, linestyle=line, label=label)
        axes.fill_between(steps, alive.min(axis=0), alive.max(axis=0), color=color, alpha=0.16, linewidth=0)
    _legend(axes)
    return figure


def sensitivity_figure(methods: Sequence[Method]) -> Figure:
    """Final loss against learning rate: medians as lines, seeds as points, the best ringed."""
    figure, axes = _axes("learning rate", "final training loss")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for method, (color, line) in zip(methods, _styles(methods), strict=True):
        tuned = method.tuned
        axes.plot(
            tuned.learning_rates, _finite(tuned.medians), color=color, linestyle=line, label=method.name
        )
        grid = np.broadcast_to(tuned.learning_rates[:, None], tuned.final.shape)
        axes.plot(
            grid.ravel(), _finite(tuned.final).ravel(), ".", color=color, alpha=0.55, markersize=5, mew=0
        )
        ring = dict(markersize=9, markerfacecolor="none", markeredgecolor=color, markeredgewidth=1.6)
        axes.plot([tuned.learning_rate], _finite(np.array([tuned.median])), "o", **ring)
    _legend(axes)
    return figure


def to_svg(figure: Figure, name: str, *, standalone: bool = False) -> str:
    """Renders a figure.

    Args:
      figure: from one of the functions above.
      name: seeds the ids inside, so that several figures can share a page; lower-case letters.
      standalone: a picture of its own, on white paper, instead of one that takes the page's text colour.

    Returns:
      The ``<svg>`` element; for a standalone one, a whole SVG file.
    """
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        if standalone:
            figure.patch.set_facecolor("#ffffff")
        else:
            figure.patch.set_alpha(0.0)
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    text = file.getvalue().replace(INK, PAPER_INK if standalone else "currentColor")
    for kind in ("figure", "axes", "patch", "line2d", "text", "matplotlib.axis", "legend", "xtick", "ytick"):
        text = text.replace(f'id="{kind}_', f'id="{name}-{kind}_')
    return text if standalone else text[text.index("<svg") :]


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    """An empty figure with labelled axes, drawn in the placeholder ink."""
    figure = Figure(figsize=(7.2, 3.7), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("none")
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.tick_params(which="both", colors=INK, labelsize=9)
    axes.grid(True, which="major", color=INK, alpha=0.12, linewidth=0.8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    return figure, axes


def _legend(axes: Axes) -> None:
    """A legend above the axes, where it hides no data."""
    entries = axes.get_legend_handles_labels()[1]
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=min(2, max(1, len(entries))),
        frameon=False,
        labelcolor=INK,
        fontsize=9,
        handlelength=2.6,
    )


def _styles(methods: Sequence[Method]) -> list[tuple]:
    """A (colour, line style) for every method."""
    return [STYLES[i % len(STYLES)] for i in range(len(methods))]


def _finite(values: np.ndarray) -> np.ndarray:
    """NaN, which matplotlib leaves out, wherever a value is not finite or not positive."""
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _running(values: np.ndarray, window: int, statistic: object) -> np.ndarray:
    """A trailing running statistic, over fewer values at the start; NaN where there is none."""
    windows = (values[max(0, i - window + 1) : i + 1] for i in range(len(values)))
    return np.array([statistic(w) if not np.all(np.isnan(w)) else np.nan for w in windows])
