"""Sentences and numbers of an evaluation's report, as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from celo_nnx.evaluation.aggregates import FEWEST, Estimate
from celo_nnx.evaluation.results import ADAM, DEVICES, NOT_YET, Entry, Results
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
    score, faster = best.score["iqm"], fastest.faster
    of_losses = against(best.label, score, 1, "ends at lower losses", "ends at higher losses")
    of_steps = against(fastest.label, faster, 0, "needs fewer steps", "needs more steps")
    words = interval(score), interval(fastest.speedup["iqm"], fastest.bounded)
    if len(others) == 1:
        which = f"{best.label} has a final-loss score of {words[0]}", f"Its speedup is {words[1]}"
    else:
        highest = f"{best.label} has the highest final-loss score of {len(others)} optimizers besides Adam"
        which = f"{highest}, {words[0]}", f"The largest speedup is that of {fastest.label}, {words[1]}"
    own = next(standing for standing in ranking if standing.label == ADAM).speedup["iqm"].value
    return [
        f"{over}, {which[0]}; tuned Adam has 1. {of_losses}",
        f"{which[1]}; Adam's own is {shown(own)}, and the difference {interval(faster, fastest.bounded)}. "
        f"{of_steps}",
    ]


def against(label: str, estimate: Estimate, adam: int, better: str, worse: str) -> str:
    """Whether an estimate tells an optimizer from Adam, which has ``adam``."""
    if estimate.low is None or estimate.high is None:
        return f"With fewer than {FEWEST} seeds there is no interval, so how sure this is cannot be said."
    if estimate.low == estimate.high:
        return "The interval has no width, so how sure this is cannot be said."
    if estimate.low > adam:
        return f"The interval lies above {adam}: {label} {better} than Adam."
    if estimate.high < adam:
        return f"The interval lies below {adam}: {label} {worse} than Adam."
    return f"The interval includes {adam}: {label} cannot be told from Adam by it."


def state(results: Results, missing: Mapping[str, str], versions: Mapping[str, Sequence[str]]) -> list[str]:
    """What is not done, and what else the reader must know before the scores.

    Args:
      results: as they are by now.
      missing: why tasks are left out of the scores.
      versions: all values of the cells' versions, by name.
    """
    out, tasks = [], counted(len(results.tasks), "task")
    if behind := results.under_way():
        words = ", ".join(f"{label}, {count} of {tasks}" for label, count in behind.items())
        out.append(f"Under way, and so left out of the scores over tasks: {words}.")
    if waiting := [name for name, reason in missing.items() if reason.startswith(NOT_YET)]:
        all_ = "all other optimizers" if behind else "all optimizers"
        done = f"{all_} are done with {len(results.tasks) - len(waiting)} of {tasks}"
        out.append(f"The evaluation is not finished: {done}, and only those count.")
    if skipped := len(results.evaluation.skipped):
        verb = "was" if skipped == 1 else "were"
        out.append(f"{counted(skipped, 'task')} of the suite {verb} skipped, see below.")
    for name, values in versions.items():
        if len(values) > 1:
            rest = ", so step times are only compared on the same devices" if name == DEVICES else ""
            out.append(f"Not all runs were made with the same {name}: {'; '.join(values)}{rest}.")
    if results.strays:
        cells = counted(results.strays, "cell")
        out.append(f"{cells} in the folder belong to none of these optimizers and tasks and were left out.")
    return out


def table(ranking: Sequence[Standing]) -> list[str]:
    """The scores as lines for a terminal, best first; none without scores."""
    rows = [("", "final loss", "", "speedup", "", "less adam's", "")]
    for one in ranking:
        row, sign = [one.label], "≥ " if one.bounded else ""
        for found, before in ((one.score["iqm"], ""), (one.speedup["iqm"], sign), (one.faster, sign)):
            row += ["", ""] if found is None else [before + shown(found.value), ends(found)]
        rows.append(tuple(row))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
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
