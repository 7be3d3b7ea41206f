"""What a rule does as one HTML file, and its numbers as CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import markupsafe
import numpy as np

import celo_nnx
from celo_nnx.description import count
from celo_nnx.errors import printable, require
from celo_nnx.evaluation import page
from celo_nnx.evaluation.plots import to_svg
from celo_nnx.evaluation.progress import Progress
from celo_nnx.explain import pictures
from celo_nnx.explain.record import AGAINST, Recording, Tensor, cosine, fullest, record
from celo_nnx.explain.responses import Response, Weights, responses, weights
from celo_nnx.explain.subject import Subject, find
from celo_nnx.files import told

MARK = b'content="celo-nnx explain"'  # tells a page of ours, which may be replaced
COLUMNS = ("quantity", "tensor", "feature", "plane", "against", "seed", "step", "x", "value")
STEPS = 60
SMALL = 0.05  # a change of the step that the summary calls small


@dataclasses.dataclass(frozen=True)
class Findings:
    """All that a page shows of a rule."""

    subject: Subject
    recording: Recording
    responses: list[Response]
    weights: list[Weights]

    @property
    def steps(self) -> int:
        """How many steps were recorded."""
        return self.recording.losses.shape[1]

    @property
    def last(self) -> int:
        """Steps at the end over which losses are averaged."""
        return max(1, self.steps // 6)


def explain(
    text: str,
    out: str | os.PathLike[str] | None = None,
    *,
    steps: int = STEPS,
    learning_rate: float | None = None,
) -> Path:
    """Writes what a rule does as an HTML page, with its numbers as CSV beside it.

    Args:
      text: which rule, as :func:`celo_nnx.explain.subject.find` takes it.
      out: a new ``.html`` file; by default ``explain.html`` in a run folder, else ``explain-NAME.html`` here,
        where a newer page replaces an older.
      steps: of the recorded run.
      learning_rate: of it; by default what the weights' card recommends, else the optimizer's schedule.

    Returns:
      The page's path.

    Raises:
      UserError: no such rule, one without an MLP, a number out of range, or a file would be overwritten.

    Example:
      >>> explain("celo2")  # doctest: +SKIP
      PosixPath('explain-celo2.html')
    """
    require(out is None or str(out).endswith(".html"), "out", str(out), "a new file NAME.html")
    rate = learning_rate
    require(rate is None or 0 < rate < float("inf"), "learning_rate", rate, "a number above 0")
    subject = find(text)
    default = Path(text, "explain.html") if os.path.isdir(text) else Path(f"explain-{subject.name}.html")
    path = default if out is None else Path(out)
    with told(path):
        page.refuse_foreign(path, default, MARK)
        numbers = path.with_suffix(".csv")
        page.refuse_foreign(numbers, default.with_suffix(".csv"), ",".join(COLUMNS).encode())
    with Progress([8.0, 2.0, 2.0]) as progress:
        progress.start("compiling the record")
        rule = subject.optimizer
        recording = record(
            rule,
            steps=steps,
            learning_rate=subject.learning_rate if rate is None else rate,
            told=lambda step: progress.start(f"recording: step {step} of {steps}"),
        )
        progress.done(f"recorded {steps} steps")
        progress.start("moving every feature")
        found = Findings(subject, recording, responses(rule, recording), weights(rule))
        progress.done(f"moved {len(found.responses)} feature planes")
        progress.start("drawing")
        words = ["celo-nnx", "explain", text, "--steps", str(steps)]
        words += ["--learning-rate", f"{rate:g}"] if rate is not None else []
        page_text = html(found, shlex.join(words))
        with told(path):
            page.write(numbers, to_csv(found))
            page.write(path, page_text)
        progress.done(f"drew {path}")
    return path


def html(found: Findings, command: str = "") -> str:
    """Returns the page."""
    recording = found.recording
    path, tensor = max(fullest(recording).items(), key=lambda pair: pair[1].raw.shape[1])
    middle = found.steps // 2
    drawn = {
        "responses": pictures.response_figure(found.responses),
        "weights": pictures.weights_figure(found.weights),
        "cosines": pictures.cosine_figure(recording.tensors),
        "scatter": pictures.scatter_figure(path, tensor, middle),
        "left_out": pictures.left_out_figure(recording, found.last),
    }
    svg = {name: markupsafe.Markup(to_svg(x, f"explain{name}".replace("_", ""))) for name, x in drawn.items()}
    return page.render(
        "explain.html",
        title=f"What the rule {printable(found.subject.name)} does",
        summary=summary(found),
        svg=svg,
        turned=any(x.aligned for x in recording.tensors.values()),
        scatter={"path": path, "step": middle + 1},
        tensors=[(path, str(x.spec.own or x.spec.shape)) for path, x in recording.tensors.items()],
        shown=list(fullest(recording)),
        rows=table(found),
        last=found.last,
        seeds=len(recording.losses),
        steps=found.steps,
        command=command,
        versions=f"celo_nnx {celo_nnx.__version__}, jax {jax.__version__}, {jax.default_backend()}",
    )


def summary(found: Findings) -> list[str]:
    """What the rule is and does, in sentences."""
    recording, rule = found.recording, found.subject.optimizer
    groups = [w.group for w in found.weights if not w.context]
    context = sum(len(w.rms) for w in found.weights if w.context)
    besides = f", and {context} numbers of its tensor and the run" if context else ""
    out = [
        f"{_upper(printable(found.subject.about))}: {count(rule):,} meta-parameters; an MLP that sees "
        f"{len(groups)} feature groups in {len(found.responses)} planes{besides}."
    ]
    near = {name: _mean_cosine(recording, name) for name in AGAINST}
    first, *others = sorted(near, key=lambda name: -near[name])
    rest = ", ".join(f"{pictures.NAMES[name]} {near[name]:.2f}" for name in others)
    out.append(
        f"What the MLP does is nearest to {pictures.NAMES[first]}: the mean cosine of their steps is "
        f"{near[first]:.2f} ({rest})."
    )
    changes = {g: _mean(recording, "raw_change", g) for g in recording.losses_without}
    most = max(changes, key=lambda g: changes[g])
    small = sum(x < SMALL for x in changes.values())
    out.append(
        f"Without {most} the MLP's step changes most, by {changes[most]:.0%} of its size; {small} of "
        f"{len(changes)} groups change it by less than {SMALL:.0%}."
    )
    losses = recording.losses
    out.append(
        f"Recorded while it trained a small network on digits for {found.steps} steps at learning rate "
        f"{recording.learning_rate:.3g}: the loss went from {losses[:, 0].mean():.3g} to "
        f"{losses[:, -found.last :].mean():.3g}."
    )
    return out


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _mean_cosine(recording: Recording, name: str) -> float:
    return float(np.mean([np.mean(cosine(x.raw, x.against[name])) for x in recording.tensors.values()]))


def _mean(recording: Recording, quantity: str, group: str) -> float:
    """The mean of a quantity over tensors, seeds and steps, without a group."""
    return float(np.mean([np.mean(getattr(x, quantity)[group]) for x in recording.tensors.values()]))


def table(found: Findings) -> list[list[str]]:
    """A row a feature group: planes, weights, response, and what leaving it out does."""
    recording, out = found.recording, []
    for w in found.weights:
        sizes = [r.size for r in found.responses if r.group == w.group]
        loss = pictures.loss_change(recording, w.group, found.last)
        out.append(
            [
                printable(w.group),
                str(len(w.rms)),
                f"{np.sqrt(np.mean(np.square(w.rms))):.3f}",
                f"{max(sizes):.3f}" if sizes else "-",
                f"{_mean(recording, 'raw_change', w.group):.1%}",
                f"{_mean(recording, 'change', w.group):.1%}",
                f"{_mean(recording, 'cosine', w.group):.3f}",
                f"{loss.mean():+.4f}",
            ]
        )
    return out


def to_csv(found: Findings) -> str:
    """Returns all numbers, a row each; columns that say nothing of a quantity are empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_rows(found))
    return file.getvalue()


def _rows(found: Findings) -> Iterator[dict[str, Any]]:
    for w in found.weights:
        for label, size in zip(w.labels, w.rms, strict=True):
            yield dict(quantity="weight_rms", feature=w.group, plane=label, value=float(size))
    for r in found.responses:
        low, high = np.percentile(r.change, (10, 90), axis=0)
        curves = {"median": r.median, "percentile_10": low, "percentile_90": high, "zero": r.others_zero}
        for name, curve in curves.items():
            named = dict(quantity=f"response_{name}", feature=r.group, plane=r.label)
            for x, value in zip(r.x, curve, strict=True):
                yield named | dict(x=float(x), value=float(value))
    for path, tensor in found.recording.tensors.items():
        for row in _of_tensor(tensor):
            yield dict(tensor=path) | row
    losses = {"": found.recording.losses} | found.recording.losses_without
    for group, values in losses.items():
        named = dict(quantity="loss_without" if group else "loss", feature=group)
        yield from (named | row for row in _over_steps(values))


def _of_tensor(tensor: Tensor) -> Iterator[dict[str, Any]]:
    for name, own, others in (
        ("cosine_raw", tensor.raw, tensor.against),
        ("cosine_step", tensor.step, tensor.aligned or tensor.against),
    ):
        for against, x in others.items():
            yield from (
                dict(quantity=name, against=against) | row for row in _over_steps(cosine(own, x)[None])
            )
    for name in ("change", "raw_change", "cosine"):
        for group, values in getattr(tensor, name).items():
            for seed, value in enumerate(values.mean(axis=1)):
                yield dict(quantity=f"{name}_without", feature=group, seed=seed, value=float(value))


def _over_steps(values: np.ndarray) -> Iterable[dict[str, Any]]:
    """Rows of ``[seeds, steps]``; steps count from 1."""
    for (seed, step), value in np.ndenumerate(values):
        yield dict(seed=seed, step=step + 1, value=float(value))
