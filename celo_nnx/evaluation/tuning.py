"""Tunes a learning rate: a half-decade grid times seeds, widened where the best rate lies on its edge."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optax

from celo_nnx.errors import require
from celo_nnx.evaluation.baselines import trained
from celo_nnx.evaluation.curves import Curves, HeldOut, Tuned, choose, train_runs, tune
from celo_nnx.interfaces import PyTree, Task

BLOCK = 2  # half-decades added at once: every addition has one shape, and so one compilation
LIMIT = 4  # half-decades that a grid may grow by at each end


@dataclasses.dataclass(frozen=True)
class Grid:
    """A tuned optimizer on a task.

    Attributes:
      learning_rates: ``[n_lr]``, ascending, half a decade apart.
      curves: all runs.
      training: the choice by final training loss.
      validation: the choice by the last loss on the held-out set ``"validation"``; None without such a set.
    """

    learning_rates: np.ndarray
    curves: Curves
    training: Tuned
    validation: Tuned | None


def half_decades(first: int, last: int) -> np.ndarray:
    """The learning rates ``10^(i/2)`` for ``i = first, ..., last``.

    Example:
      >>> half_decades(-4, -2).round(4).tolist()
      [0.01, 0.0316, 0.1]
    """
    require(last >= first, "grid", (first, last), "two integers, the first not above the second")
    return 10.0 ** (np.arange(first, last + 1) / 2)


def search(
    make_tx: Callable[..., optax.GradientTransformation],
    task: Task,
    data: dict[str, Any],
    *,
    grid: tuple[int, int],
    seeds: Sequence[int],
    steps: int,
    context: tuple[PyTree, ...] = (),
    held_out: HeldOut | None = None,
    eval_params: Callable[[PyTree, PyTree], PyTree] = trained,
    limit: int = LIMIT,
) -> Grid:
    """Trains over a grid, and widens it until the best rates lie inside or the limit is reached.

    The best rate has the smallest median over seeds; by training loss and, where there is a validation set,
    by its loss as well. While either lies on an edge, a decade is added there (at the lower edge where every
    run diverged). Nothing is drawn at random, so the same arguments try the same rates.

    Args:
      make_tx, task, data, seeds, steps, context, held_out, eval_params: as
        :func:`celo_nnx.evaluation.curves.train_runs` takes them.
      grid: the rates to begin with, ``10^(i/2)`` from the first number to the second.
      limit: by how many half-decades each end may move.

    Returns:
      The runs and both choices; a choice that is still on an edge has a ``warning``.

    Raises:
      UserError: a grid that descends, a negative limit, and what ``train_runs`` raises.

    Example:
      >>> search(optax.adam, task, data, grid=(-8, -2), seeds=[0, 1, 2], steps=1000)  # doctest: +SKIP
    """
    require(limit >= 0, "limit", limit, "an integer >= 0")
    first, last = grid
    lowest, highest = first - limit, last + limit
    options = dict(seeds=seeds, steps=steps, context=context, held_out=held_out, eval_params=eval_params)

    def train(first: int, last: int) -> Curves:
        return train_runs(make_tx, task, data, learning_rates=half_decades(first, last), **options)

    curves = train(first, last)
    while True:
        rates = half_decades(first, last)
        training = tune(curves.losses, rates)
        other = curves.held_out.get("validation")
        validation = None if other is None else choose(other[..., -1], rates)
        best = {training.best, training.best if validation is None else validation.best}
        if 0 in best and first > lowest:
            begin = max(lowest, first - BLOCK)
            curves, first = _joined(train(begin, first - 1), curves), begin
        elif len(rates) - 1 in best and last < highest:
            end = min(highest, last + BLOCK)
            curves, last = _joined(curves, train(last + 1, end)), end
        else:
            return Grid(rates, curves, training, validation)


def _joined(lower: Curves, upper: Curves) -> Curves:
    """Both grids' runs, one after the other."""
    held_out = {name: np.concatenate([value, upper.held_out[name]]) for name, value in lower.held_out.items()}
    return Curves(np.concatenate([lower.losses, upper.losses]), held_out, lower.cost + upper.cost)
