"""Cards of meta-trained weights: from a run, its selection and its evaluation to files that can be shipped.

A card says what a theta is, and everything in it is read from the folders that it is made of: theta is found
in both evaluations by its digest. The selection rule never looks at the evaluation: among the candidates on a
suite of validation tasks the one with the largest interquartile mean of final-loss scores is chosen, and a
card of another one is refused. The recommended learning rate is chosen on those tasks too.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from celo_nnx import run_report
from celo_nnx.errors import UserError, require
from celo_nnx.evaluation import plots, scores, suite_csv, suite_plots
from celo_nnx.evaluation.aggregates import Estimate, aggregate
from celo_nnx.evaluation.results import ADAM, Results, load_results
from celo_nnx.evaluation.standings import Standing, standings
from celo_nnx.files import parse_json, told
from celo_nnx.meta.checkpoint import digest, flatten
from celo_nnx.phases import phase_at, plan
from celo_nnx.run_files import agree, theta_header
from celo_nnx.run_folder import RunFolder
from celo_nnx.run_report import date
from celo_nnx.theta_io import FILE_NAME, load_theta, read_metadata, save_theta
from celo_nnx.weights import FORMAT

FIRST = 20  # meta-iterations whose losses a card keeps, for celo_nnx.verify
RULE = "the largest interquartile mean of final-loss scores on the selection suite"
Files = dict[str, str | bytes]


def write_card(
    run_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    selection: str | os.PathLike[str],
    evaluation: str | os.PathLike[str],
    theta: str | os.PathLike[str] | None = None,
    command: str = "",
    about: str = "",
) -> dict[str, Any]:
    """Writes the files of weights and their record into a new folder.

    Args:
      run_dir: the run folder of ``celo-nnx train``.
      out: a new folder; its name is the name of the weights. It gets ``NAME.safetensors`` and ``NAME.json``,
        and of the record ``log.csv``, ``run.html``, ``selection.csv``, ``scores.csv``, ``summary.csv`` and
        pictures.
      selection: the folder of an evaluation on validation tasks, with all candidates.
      evaluation: the folder of an evaluation with this theta.
      theta: one of the run's, such as a snapshot; by default its last.
      command: what made the run, as a user would type it.
      about: a line for lists.

    Returns:
      The card.

    Raises:
      UserError: a folder is not what it should be, theta is not in both evaluations or not of the run, there
        is no other candidate, or the selection rule prefers another one.
    """
    out, run = Path(out), RunFolder(run_dir)
    name = out.absolute().name
    path = Path(theta) if theta is not None else run.path / FILE_NAME
    found, header = load_theta(path), read_metadata(path)
    config = parse_json(header.get("config", "{}"), f"the config in the header of {path}")
    mine = run.config
    if header.get("phase"):  # its header has the optimizer of its phase
        iteration = int(header["iteration"])
        phase = phase_at(plan(ConfigDict(run.config)), iteration)
        mine = json.loads(theta_header(run.config, iteration, phase)["config"])
    agree(mine, config, f"the theta {path}")
    chosen, judged = load_results(selection), load_results(evaluation)
    of_theta = digest(flatten(found), {})
    label, tested = _label(chosen, of_theta), _label(judged, of_theta)
    rivals = {s.label: s for s in standings(chosen)}
    parts = _decided(chosen, label).get("learned")
    candidates = {k: s for k, s in rivals.items() if _decided(chosen, k).get("learned") == parts}
    if len(candidates) < 2:
        raise UserError(
            f"{selection} has no candidate but {label!r}: evaluate its start and snapshots there too"
        )
    best = max(candidates, key=lambda k: candidates[k].score["iqm"].value)
    if candidates[best].score["iqm"].value > candidates[label].score["iqm"].value:
        raise UserError(f"{selection}: the selection rule prefers {best!r} to {label!r}: {RULE}")
    rate = fixed_rate(chosen, label)
    rows = run.metrics["iteration"] <= int(header["iteration"])
    card = {
        "format": FORMAT,
        "name": name,
        "about": about,
        "digest": header["digest"],
        "learning_rate": {"recommended": rate, "chosen_on": chosen.evaluation.suite["name"]},
        "made": {
            "command": command,
            "iteration": int(header["iteration"]),
            "seed": run.config["seed"],
            "date": date(run.metrics["time"][rows][-1])[:10],
            "seconds": round(float(run.metrics["time"][rows][-1] - run.starts[0].time), 1),
            "starts": [dict(start.info) | {"iteration": start.iteration} for start in run.starts],
            "data": run.info.get("data"),
            "first_losses": run.metrics["loss"][:FIRST].tolist(),
        },
        "selection": {
            "rule": RULE,
            "suite": _suite(chosen),
            "candidates": [
                _scores(standing) | {"theta": _decided(chosen, other)["theta"], "chosen": other == label}
                for other, standing in candidates.items()
            ],
            "others": [_scores(standing) for k, standing in rivals.items() if k not in candidates],
        },
        "evaluation": {
            "suite": _suite(judged),
            "label": tested,
            "optimizers": [_scores(standing) for standing in standings(judged)],
            "at_recommended_rate": at_rate(judged, tested, rate),
        },
        "config": config,
    }
    record: Files = {
        f"{name}.json": json.dumps(card, indent=1) + "\n",
        "log.csv": log(run),
        "run.html": run_report.html(run),
        "selection.csv": suite_csv.optimizers(chosen, standings(chosen)),
        "scores.csv": suite_csv.runs(judged),
        "summary.csv": suite_csv.optimizers(judged, standings(judged)),
    } | pictures(run, judged)
    with told(out):
        require(not out.exists(), "out", str(out), "a new folder")
        out.mkdir(parents=True)
        for file, text in record.items():
            (out / file).write_text(text, encoding="utf-8")
        kept = {key: value for key, value in header.items() if key not in ("format", "digest")}
        save_theta(out / f"{name}.safetensors", found, kept)
    return card


def _decided(results: Results, label: str) -> dict[str, Any]:
    """What decides an optimizer, as its cells say; a learned one has its parts and the digest of theta."""
    found = (task.entries[label].cell for task in results.tasks if label in task.entries)
    cell = next(found, None)
    return cell.config.get("optimizer", {}) if cell else {}


def _label(results: Results, of_theta: str) -> str:
    """What an evaluation calls the optimizer with this theta."""
    for label in results.evaluation.labels:
        if _decided(results, label).get("theta") == of_theta:
            return label
    raise UserError(f"{results.folder} has no optimizer with the theta of digest {of_theta[:12]}")


def _suite(results: Results) -> dict[str, Any]:
    suite = results.evaluation.suite
    return {key: suite[key] for key in ("name", "steps", "schedule", "seeds")} | {
        "tasks": [task.name for task in results.finished()]
    }


def _three(estimate: Estimate | None) -> list[float | None] | None:
    return None if estimate is None else [estimate.value, estimate.low, estimate.high]


def _scores(standing: Standing) -> dict[str, Any]:
    """Value, lower and upper end of the interval of each score of an optimizer."""
    return {
        "label": standing.label,
        "final_loss_iqm": _three(standing.score["iqm"]),
        "speedup_iqm": _three(standing.speedup["iqm"]),
        "speedup_lower_bounds": standing.at_least,
        "diverged": standing.diverged,
        "runs": standing.runs,
    }


def fixed_rate(results: Results, label: str) -> float:
    """Returns the learning rate that is best for all tasks at once.

    It has the smallest mean over tasks of the logarithm of its loss, counted from the floor where there is
    one, less that at the task's own best rate. Only rates that every task has tried count.

    Raises:
      UserError: no rate was tried on every task without divergence.
    """
    costs: dict[float, list[float]] = {}
    tasks = results.finished()
    for task in tasks:
        tuned = task.entries[label].tuned
        gaps = np.asarray(tuned.medians) - (task.floor or 0.0)
        for rate, gap in zip(tuned.learning_rates, gaps, strict=True):
            if np.isfinite(gap) and gap > 0:
                costs.setdefault(round(float(rate), 12), []).append(float(np.log(gap / gaps[tuned.best])))
    means = {rate: np.mean(found) for rate, found in costs.items() if len(found) == len(tasks)}
    if not means:
        raise UserError(f"{results.folder}: no learning rate of {label} was tried on every task")
    return min(means, key=means.__getitem__)


def at_rate(results: Results, label: str, rate: float) -> dict[str, Any]:
    """Returns how an optimizer does at one learning rate everywhere, against Adam tuned on every task.

    Args:
      results: of the evaluation.
      label: the optimizer.
      rate: one that every task has tried.

    Raises:
      UserError: a task has not tried it.
    """
    columns, diverged = [], []
    for task in results.finished():
        tuned = task.entries[label].tuned
        place = np.flatnonzero(np.isclose(tuned.learning_rates, rate, rtol=1e-6))
        if not len(place):
            raise UserError(f"{results.folder}: {label} was not run at {rate:.3g} on {task.name}")
        final = tuned.final[place[0]]
        diverged += [task.name] * int((~np.isfinite(final)).sum())
        columns.append(scores.final_loss_score(task.entries[ADAM].training.final, final, task.floor))
    found = np.stack(columns, axis=1)
    return {
        "learning_rate": rate,
        "final_loss_iqm": _three(aggregate(found, "iqm")),
        "runs": int(found.size),
        "diverged": diverged,
    }


def log(run: RunFolder) -> str:
    """Returns the log of a run as CSV: a row a meta-iteration, losses to six digits."""
    families = run.metrics.families("family_loss")
    columns: Mapping[str, np.ndarray] = {"loss": run.metrics["loss"]} | {
        f"loss of {name}": column for name, column in families.items()
    }
    columns |= {"gradient_norm": run.metrics["gradient_norm"], "theta_norm": run.metrics["theta_norm"]}
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["iteration", *columns])
    for i, iteration in enumerate(run.metrics["iteration"]):
        writer.writerow([int(iteration), *(f"{column[i]:.6g}" for column in columns.values())])
    return file.getvalue()


def pictures(run: RunFolder, judged: Results) -> dict[str, str]:
    """Returns SVGs by file name: the meta-loss, the scores and their profiles."""
    ranking = standings(judged)
    svg = lambda figure, name: plots.to_svg(figure, name, standalone=True)  # noqa: E731
    found = {"scores.svg": svg(suite_plots.dots_figure(ranking), "scores")}
    for what in ("score", "speedup"):
        figure = suite_plots.profile_figure(judged, ranking, what)
        found[f"profile_{what}.svg"] = svg(figure, f"profile{what}")
    course: Sequence[dict[str, Any]] = run_report.figures(run)
    return found | ({"meta_loss.svg": str(course[0]["svg"])} if course else {})
