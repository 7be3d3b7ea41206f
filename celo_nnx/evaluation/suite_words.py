"""Sentences and numbers of an evaluation's report, as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from celo_nnx.evaluation.aggregates import Estimate
from celo_nnx.evaluation.results import ADAM, NOT_YET, Entry, Results
from celo_nnx.evaluation.scores import LONGEST
from celo_nnx.evaluation.standings import Standing


def verdict(results: Results, ranking: Sequence[Standing]) -> list[str]:
    """The result in a few sentences, whichever way it falls."""
    if ADAM not in results.evaluation.labels:
        return ["adam is not among the optimizers, so there are no scores, only losses."]
    if not ranking:
        return ["No task has been finished by all optimizers with a score, so there is no result yet."]
    others = [standing for standing in ranking if standing.label != ADAM]
    tasks, seeds = len(results.finished()), len(results.evaluation.suite["seeds"])
    over = f"Over {counted(tasks, 'task')} and {counted(seeds, 'seed')}"
    if not others:
        return [f"{over}, adam alone was evaluated; all are scored against it, so its scores are 1."]
    best = others[0]
    fastest = max(others, key=lambda standing: standing.speedup["iqm"].value)
    score, speedup = best.score["iqm"], fastest.speedup["iqm"]
    of_losses = against(best.label, score, "ends at lower losses", "ends at higher losses")
    of_steps = against(fastest.label, speedup, "needs fewer steps", "needs more steps")
    words = interval(score), interval(speedup, fastest.bounded)
    if len(others) == 1:
        which = f"{best.label} has a final-loss score of {words[0]}", f"Its speedup is {words[1]}"
    else:
        highest = f"{best.label} has the highest final-loss score of {len(others)} optimizers besides Adam"
        which = f"{highest}, {words[0]}", f"The largest speedup is that of {fastest.label}, {words[1]}"
    own = next(standing for standing in ranking if standing.label == ADAM).speedup["iqm"].value
    return [
        f"{over}, {which[0]}; tuned Adam has 1. {of_losses}",
        f"{which[1]}; Adam's own is {shown(own)}. {of_steps}",
    ]


def against(label: str, estimate: Estimate, better: str, worse: str) -> str:
    """Whether an interquartile mean tells an optimizer from Adam, which has 1."""
    if estimate.low is None or estimate.high is None:
        return "With one seed there is no interval, so how sure this is cannot be said."
    if estimate.low > 1:
        return f"The interval lies above 1: {label} {better} than Adam."
    if estimate.high < 1:
        return f"The interval lies below 1: {label} {worse} than Adam."
    return f"The interval includes 1: {label} cannot be told from Adam by it."


def state(results: Results, missing: dict[str, str]) -> list[str]:
    """What is not done, and what else the reader must know before the scores."""
    out, tasks = [], counted(len(results.tasks), "task")
    if waiting := [name for name, reason in missing.items() if reason.startswith(NOT_YET)]:
        done = f"all optimizers are done with {len(results.tasks) - len(waiting)} of {tasks}"
        out.append(f"The evaluation is not finished: {done}, and only those count.")
    caps = {task.cap for task in results.finished()}
    if ADAM in results.evaluation.labels and caps and max(caps) < LONGEST:
        cap = f"{max(caps):g}"
        out.append(f"Adam was trained for up to {cap} times the steps only, so no speedup is above {cap}.")
    if skipped := len(results.evaluation.skipped):
        verb = "was" if skipped == 1 else "were"
        out.append(f"{counted(skipped, 'task')} of the suite {verb} skipped, see below.")
    if results.strays:
        cells = counted(results.strays, "cell")
        out.append(f"{cells} in the folder belong to none of these optimizers and tasks and were left out.")
    return out


def table(ranking: Sequence[Standing]) -> list[str]:
    """The scores as lines for a terminal, best first; none without scores."""
    rows = [("", "final loss", "", "speedup", "")]
    for one in ranking:
        score, speedup, sign = one.score["iqm"], one.speedup["iqm"], "≥ " if one.bounded else ""
        rows.append((one.label, shown(score.value), ends(score), sign + shown(speedup.value), ends(speedup)))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    padded = ("  ".join(f"{word:<{n}}" for word, n in zip(row, widths, strict=True)) for row in rows)
    return [line.rstrip() for line in padded] if ranking else []


def middle(values: np.ndarray) -> tuple[str, str]:
    """The median, and the range of several values."""
    few = f"{losses_of(values.min())} to {losses_of(values.max())}" if len(values) > 1 else ""
    return losses_of(np.median(values)), few


def losses(values: np.ndarray) -> str:
    """The median of losses as text."""
    return middle(values)[0]


def losses_of(value: float) -> str:
    """A loss or score as text."""
    return shown(value) if math.isfinite(value) else "diverged"


def speedups(entry: Entry) -> tuple[str, str]:
    """The median and the range of speedups, with a sign where it is a lower bound that is shown."""
    values, at_least = np.asarray(entry.speedup), np.asarray(entry.at_least)
    n = len(values)
    order = np.argsort(values, kind="stable")
    sign = lambda some: "≥ " if at_least[order[some]].any() else ""  # noqa: E731
    few = f"{sign([0])}{shown(values.min())} to {sign([-1])}{shown(values.max())}" if n > 1 else ""
    return sign(list(range((n - 1) // 2, n // 2 + 1))) + shown(np.median(values)), few


def interval(estimate: Estimate, bounded: bool = False) -> str:
    """An aggregate with its interval as text."""
    return f"{'at least ' if bounded else ''}{shown(estimate.value)} {ends(estimate)}".strip()


def ends(estimate: Estimate) -> str:
    """An interval as text, empty where there is none."""
    return "" if estimate.low is None else f"[{shown(estimate.low)}, {shown(estimate.high)}]"


def shown(value: Any) -> str:
    """A number to three digits.

    Example:
      >>> shown(1.2), shown(0.0), shown(0.00031623), shown(8388608.0)
      ('1.20', '0', '0.000316', '8.39e+06')
    """
    return f"{value:#.3g}" if value else "0"


def counted(n: int, what: str) -> str:
    """A number of things.

    Example:
      >>> counted(1, "task"), counted(3, "task")
      ('1 task', '3 tasks')
    """
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def letters(i: int) -> str:
    """A number as lower-case letters, for the ids of a figure.

    Example:
      >>> letters(0), letters(27)
      ('a', 'bb')
    """
    return (letters(i // 26) if i >= 26 else "") + chr(ord("a") + i % 26)
