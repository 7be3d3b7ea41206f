"""The effects of a grid's axes as a picture: a row a label, a panel a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from celo_nnx.errors import printable
from celo_nnx.evaluation.plots import INK, label_axes, style
from celo_nnx.grids.effects import Effect

WIDE = 34  # characters of a label
MOST = 40  # rows


def effects_figure(found: Mapping[str, Sequence[Effect]], words: Mapping[str, str]) -> Figure | None:
    """Differences from each axis' first label, with their intervals; the axes have a colour each.

    Args:
      found: effects by number, the same labels in each.
      words: for the numbers.

    Returns:
      The figure; None where there is no effect, or more than :data:`MOST` labels.
    """
    axes_of = list(dict.fromkeys(e.axis for some in found.values() for e in some))
    labels = [(e.axis, e.label) for e in next(iter(found.values()), [])]
    if not any(math.isfinite(e.effect) and e.label != e.reference for some in found.values() for e in some):
        return None
    if len(labels) > MOST:
        return None
    figure = Figure(figsize=(7.2, 0.9 + 0.3 * len(labels)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(found), sharey=True))
    for panel, (name, some) in zip(panels, found.items(), strict=True):
        label_axes(panel, f"{words[name]}, difference", "")
        panel.axvline(0.0, color=INK, alpha=0.35, linewidth=0.8)
        for y, effect in enumerate(some):
            color = style(axes_of.index(effect.axis))[0]
            first = effect.label == effect.reference
            panel.plot(
                [effect.effect], [-y], "o", color=color, markersize=6, fillstyle="none" if first else "full"
            )
            if math.isfinite(effect.half_width):
                ends = [effect.effect - effect.half_width, effect.effect + effect.half_width]
                panel.plot(ends, [-y, -y], color=color, linewidth=2.4, alpha=0.55, solid_capstyle="butt")
        panel.grid(False, axis="y")
        panel.tick_params(axis="x", labelrotation=30)
    panels[0].set_ylim(0.6 - len(labels), 0.6)
    names = [printable(f"{axis}: {label}")[:WIDE] for axis, label in labels]
    panels[0].set_yticks(-np.arange(len(labels)), names, parse_math=False)
    for panel in panels[1:]:
        panel.tick_params(axis="y", length=0)
    return figure
