"""Figures of what a rule does; a kind of quantity has one colour in all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib.colors
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from celo_nnx.evaluation.plots import COLORS, INK, label_axes, legend_above
from celo_nnx.explain.record import AGAINST, Recording, Tensor, cosine
from celo_nnx.explain.responses import Response, Weights

BLUE, GREEN, ORANGE, PURPLE, PINK, TEAL, BROWN, GREY = COLORS
KINDS = (  # what a feature's name holds -> its kind; the first that fits
    ("momentum", "momentum", ORANGE),
    ("gradient", "gradient", BLUE),
    ("second_moment", "second moment", GREEN),
    ("parameter", "parameter", PURPLE),
    ("row", "row or column average", TEAL),
    ("column", "row or column average", TEAL),
)
OTHER = ("other", GREY)
REFERENCES = {"momentum": ORANGE, "adam": GREEN, "sign": PINK, "gradient": BLUE}
NAMES = {"momentum": "momentum", "adam": "Adam", "sign": "sign", "gradient": "gradient"}
DOTS = 350  # of a scatter
ACROSS = 3  # panels in a row
LABELLED = 8  # bars of a group at most that each have a label


def kind(group: str) -> tuple[str, str]:
    """Returns what kind of quantity a feature group is, and its colour.

    Example:
      >>> kind("momentum_rms")[0], kind("clipped_gradient")[0], kind("time_sine")[0]
      ('momentum', 'gradient', 'other')
    """
    return next(((name, color) for part, name, color in KINDS if part in group), OTHER)


def shade(color: str, i: int, count: int) -> str:
    """Returns the ``i``-th of ``count`` shades of a colour, from itself to pale."""
    share = 0.62 * i / max(1, count - 1)
    rgb = np.array(matplotlib.colors.to_rgb(color))
    return matplotlib.colors.to_hex(rgb + share * (np.array(matplotlib.colors.to_rgb("#b9bec5")) - rgb))


def response_figure(responses: Sequence[Response]) -> Figure:
    """The change of the step along every feature, a panel a group.

    All panels have one vertical range, or a tenth (x10 in the title) or a hundredth of it.
    """
    groups = list(dict.fromkeys(r.group for r in responses))
    rows = math.ceil(len(groups) / ACROSS)
    figure = Figure(figsize=(7.2, 0.5 + 1.75 * rows), layout="constrained")
    grid = figure.subplots(rows, ACROSS, squeeze=False)
    for axes in grid.flat[len(groups) :]:
        axes.set_visible(False)
    ranges = {group: _reach([r for r in responses if r.group == group]) for group in groups}
    most = max(ranges.values()) or 1.0
    for axes, group in zip(grid.flat, groups, strict=False):
        own = [r for r in responses if r.group == group]
        zooms = (100, 10) if ranges[group] > 1e-4 * most else ()  # else there is nothing to see
        zoom = next((z for z in zooms if ranges[group] * z <= most), 1)
        _panel(axes, "", "", f"{group}  \u00d7{zoom}" if zoom > 1 else group)
        axes.set_ylim(-1.05 * most / zoom, 1.05 * most / zoom)
        axes.axhline(0.0, color=INK, linewidth=0.6, alpha=0.35)
        for i, r in enumerate(own):
            color = shade(kind(group)[1], i, len(own))
            low, high = np.percentile(r.change, (10, 90), axis=0)
            axes.fill_between(r.x, low, high, color=color, alpha=0.16, linewidth=0)
            axes.plot(r.x, r.median, color=color, linewidth=1.8, label=r.label or None)
            axes.plot(r.x, r.others_zero, color=color, linewidth=1.1, linestyle=(0, (1.2, 1.6)))
        if len(own) > 1:
            options = dict(loc="best", ncols=1 + (len(own) > 3), handlelength=1.4, borderpad=0.1)
            axes.legend(fontsize=7, frameon=False, labelcolor=INK, columnspacing=0.8, **options)
    figure.supylabel("change of the step, in RMS of steps", color=INK, fontsize=9)
    figure.supxlabel("normalized feature", color=INK, fontsize=9)
    return figure


def _reach(responses: Sequence[Response]) -> float:
    """The largest change that is drawn."""
    drawn = [np.abs(np.percentile(r.change, (10, 50, 90), axis=0)).max() for r in responses]
    return float(max(*drawn, *(np.abs(r.others_zero).max() for r in responses)))


def _panel(axes: Axes, x: str, y: str, title: str) -> None:
    label_axes(axes, x, y)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_size(8.5)
    axes.yaxis.label.set_size(8.5)
    axes.tick_params(labelsize=7.5)
    axes.set_title(title, color=INK, fontsize=8.5, loc="left", pad=4, parse_math=False)


def weights_figure(weights: Sequence[Weights]) -> Figure:
    """Sizes of the first layer's weights, a bar a plane."""
    rows = sum(len(w.rms) for w in weights) + 0.6 * len(weights)
    figure = Figure(figsize=(7.2, 0.7 + 0.145 * rows), layout="constrained")
    axes = figure.subplots()
    _panel(axes, "RMS of a plane's weights over the hidden units", "", "")
    axes.grid(False, axis="y")
    place, ticks = 0.0, []
    for w in weights:
        places = place + np.arange(len(w.rms))
        shades = [shade(kind(w.group)[1], i, len(w.rms)) for i in range(len(w.rms))]
        axes.barh(places, w.rms, height=0.86, color=shades)
        labels = w.labels if len(w.rms) <= LABELLED else [""] * len(w.rms)
        for at, label, size in zip(places, labels, w.rms, strict=True):
            beside = dict(xytext=(3, 0), textcoords="offset points", va="center", parse_math=False)
            axes.annotate(label, (size, at), **beside, fontsize=6.5, color=INK)
        ticks.append((float(places.mean()), w.group))
        place = places[-1] + 1.6
    _feature_ticks(axes, ticks)
    axes.set_ylim(place - 0.9, -0.8)
    return figure


def _feature_ticks(axes: Axes, ticks: Sequence[tuple[float, str]]) -> None:
    labels = axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=8)
    for label in labels:
        label.label1.set_parse_math(False)
    axes.tick_params(axis="y", length=0)


def cosine_figure(tensors: Mapping[str, Tensor]) -> Figure:
    """Cosine of the rule's steps with those of hand-made ones over the steps, a panel a tensor."""
    turned = any(x.aligned for x in tensors.values())
    panels = [(path, x, False) for path, x in tensors.items()]
    if turned:
        panels += [(path, x, True) for path, x in tensors.items() if x.aligned]
    across = min(2, len(tensors))
    rows = math.ceil(len(panels) / across)
    figure = Figure(figsize=(7.2, 0.6 + 2.1 * rows), layout="constrained")
    grid = figure.subplots(rows, across, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (path, x, after) in zip(grid.flat, panels, strict=False):
        stage = ", both orthogonalized" if after else ", before orthogonalization" if turned else ""
        _panel(axes, "", "", path + stage)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.axhline(0.0, color=INK, linewidth=0.6, alpha=0.35)
        for name in AGAINST:
            values = cosine(x.step if after else x.raw, (x.aligned if after else x.against)[name])
            at = np.arange(1, len(values) + 1)
            axes.plot(at, values, color=REFERENCES[name], linewidth=1.6, label=NAMES[name])
    figure.supxlabel("step", color=INK, fontsize=9)
    figure.supylabel("cosine with the rule's step", color=INK, fontsize=9)
    legend_above_all(figure, grid[0, 0])
    return figure


def legend_above_all(figure: Figure, axes: Axes) -> None:
    """One legend above all panels."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=4, frameon=False, labelcolor=INK, fontsize=9
    )


def scatter_figure(path: str, tensor: Tensor, step: int, seed: int = 0) -> Figure:
    """Elements of one step against what momentum, Adam and sign would do, each in its own RMS."""
    names = AGAINST[:3]
    figure = Figure(figsize=(7.2, 2.6), layout="constrained")
    grid = figure.subplots(1, len(names), sharey=True)
    rng = np.random.default_rng(seed)
    moving = np.flatnonzero(tensor.against["gradient"][step] != 0)
    chosen = rng.permutation(moving)[:DOTS] if len(moving) else np.arange(0)
    y = _in_rms(tensor.raw[step])[chosen]
    drawn = [y, *(_in_rms(tensor.against[name][step])[chosen] for name in names)]
    reach = float(np.percentile(np.abs(np.concatenate(drawn)), 99.5)) if len(chosen) else 1.0
    for axes, name in zip(grid, names, strict=True):
        x = drawn[1 + names.index(name)]
        shift = (
            rng.uniform(-0.18, 0.18, len(x)) if name == "sign" else 0.0
        )  # its points would cover each other
        _panel(axes, f"{NAMES[name]}, in its RMS", "", "")
        axes.plot([-reach, reach], [-reach, reach], color=INK, linewidth=0.7, alpha=0.4)
        axes.set_xlim(-1.1 * reach, 1.1 * reach)
        axes.set_ylim(-1.1 * reach, 1.1 * reach)
        axes.plot(x + shift, y, ".", color=REFERENCES[name], markersize=3.4, alpha=0.55, mew=0)
        angle = float(cosine(tensor.raw[step], tensor.against[name][step]))
        axes.set_title(f"cosine {angle:.2f}", color=INK, fontsize=8.5, loc="left", pad=4)
    grid[0].set_ylabel("the rule's step, in its RMS", color=INK, fontsize=8.5)
    return figure


def _in_rms(x: np.ndarray) -> np.ndarray:
    size = math.sqrt(float(np.mean(np.square(x, dtype=np.float64))))
    return x / size if size else x


def left_out_figure(recording: Recording, last: int) -> Figure:
    """What leaving a group out does to the step and, where the network is trained so, to its loss."""
    groups = list(recording.losses_without)
    figure = Figure(figsize=(7.2, 0.9 + 0.235 * len(groups)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(groups))
    turned = any(x.aligned for x in recording.tensors.values())
    of_step, of_raw = (
        [np.mean([np.mean(getattr(x, name)[g]) for x in recording.tensors.values()]) for g in groups]
        for name in ("change", "raw_change")
    )
    colors = [kind(g)[1] for g in groups]
    _panel(left, "change of the step, relative", "", "")
    left.barh(places, of_step, height=0.7, color=colors)
    if turned:
        options = dict(markersize=6, color=INK, markerfacecolor="none", label="before orthogonalization")
        left.plot(of_raw, places, "D", **options)
        legend_above(left, 1)
    _panel(right, f"change of the loss, last {last} steps", "", "")
    right.axvline(0.0, color=INK, linewidth=0.6, alpha=0.35)
    for at, g, color in zip(places, groups, colors, strict=True):
        change = loss_change(recording, g, last)
        right.barh(at, change.mean(), height=0.7, color=color, alpha=0.75)
        right.plot(change, np.full(len(change), at), "o", color=INK, markersize=2.6, alpha=0.8)
    for axes in (left, right):
        axes.grid(False, axis="y")
    _feature_ticks(left, list(zip(places, groups, strict=True)))
    left.set_ylim(len(groups) - 0.4, -0.6)
    return figure


def loss_change(recording: Recording, group: str, last: int) -> np.ndarray:
    """Returns the mean loss of the last steps without a group less that with it, ``[seeds]``."""
    return np.mean(recording.losses_without[group][:, -last:] - recording.losses[:, -last:], axis=1)
