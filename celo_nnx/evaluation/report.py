"""One self-contained HTML file that tells what was run and what came out."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import markupsafe

from celo_nnx.evaluation import page, plots
from celo_nnx.evaluation.plots import MetaCurve, Method

LIBRARIES = ("celo-nnx", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclasses.dataclass(frozen=True)
class Report:
    """What a report tells; every field is plain data, so that it can be written again.

    Attributes:
      title: the heading.
      summary: the result in a sentence or two, a paragraph each.
      steps: what was done, in order.
      meta: the course of meta-training.
      methods: the optimizers that were compared, the baseline last.
      task: what the compared optimizers trained, in words.
      optimizer: the assembled optimizer's description.
      config: the resolved config as text.
      timings: (what, seconds) pairs.
    """

    title: str
    summary: Sequence[str]
    steps: Sequence[str]
    meta: MetaCurve
    methods: Sequence[Method]
    task: str
    optimizer: str
    config: str
    timings: Sequence[tuple[str, float]]


def write(report: Report, path: Path | str) -> Path:
    """Writes the report as one HTML file without outside resources.

    Args:
      report: what to tell.
      path: where to; written whole or not at all.

    Returns:
      The path.
    """
    figures = {
        "meta": plots.to_svg(plots.meta_figure(report.meta), "meta"),
        "training": plots.to_svg(plots.training_figure(report.methods), "training"),
        "sensitivity": plots.to_svg(plots.sensitivity_figure(report.methods), "sensitivity"),
    }
    text = page.render(
        "report.html",
        title=report.title,
        summary=report.summary,
        report=report,
        figures={name: markupsafe.Markup(svg) for name, svg in figures.items()},
        rows=score_rows(report.methods),
        versions=versions(),
    )
    return page.write(Path(path), text)


def score_rows(methods: Sequence[Method]) -> list[dict[str, object]]:
    """The score table: one row a method, best first; equal methods keep their order.

    Returns:
      Rows with ``name``, ``learning_rate``, ``median``, ``seeds`` (all final losses at that learning rate),
      ``seconds`` and ``warning``.
    """
    rows = [
        {
            "name": method.name,
            "learning_rate": method.tuned.learning_rate,
            "median": method.tuned.median,
            "seeds": [float(loss) for loss in method.tuned.final[method.tuned.best]],
            "seconds": method.seconds,
            "warning": method.tuned.warning,
        }
        for method in methods
    ]
    return sorted(rows, key=lambda row: row["median"])


def versions() -> Mapping[str, str]:
    """The libraries and the machine that made the report."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    devices = jax.local_devices()
    found["devices"] = f"{len(devices)} x {devices[0].device_kind}, {os.cpu_count()} CPU cores"
    return found
