"""Effects of a grid's axes: differences between labels, paired by the other axes and the seed. Numpy, scipy.

For an axis, let ``y[s, c]`` be a number of the cell of seed ``s`` and combination ``c`` of all other axes'
labels under a label of the axis, and ``y0[s, c]`` the same under its first label. The effect of the label::

    d_s = mean over c of (y[s, c] - y0[s, c]),        effect = mean over s of d_s

with Student's interval over the ``n`` seeds, ``effect +- t(0.975, n - 1) std(d) / sqrt(n)``; one seed has
none. Pairs of which a cell is missing leave out its seed or its combination, whichever loses less.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Effect:
    """What a label does, compared with the first of its axis.

    Attributes:
      axis, label, reference: which.
      mean: of the label's numbers over the pairs; NaN without pairs.
      effect: the mean difference; NaN without pairs, 0 for the reference.
      half_width: of its interval; NaN where there is none.
      seeds, combinations: how many were paired.
      missing: how many pairs lack a number.
    """

    axis: str
    label: str
    reference: str
    mean: float
    effect: float
    half_width: float
    seeds: int
    combinations: int
    missing: int


Key = tuple[tuple[tuple[str, str], ...], int]
Table = Mapping[Key, float]


def key(labels: Mapping[str, str], seed: int) -> Key:
    """Returns where a cell's number stands in the table.

    Example:
      >>> key({"b": "1", "a": "2"}, 0)
      ((('a', '2'), ('b', '1')), 0)
    """
    return tuple(sorted(labels.items())), seed


def effects(axes: Mapping[str, Sequence[str]], planned: Sequence[Key], table: Table) -> list[Effect]:
    """Compares the labels of every axis.

    Args:
      axes: labels by axis; the first of each is the reference.
      planned: keys of all cells of the product.
      table: numbers by key; a cell without a finite one is missing.

    Returns:
      One for each label of each axis, in their order.

    Example:
      >>> axes = {"rule": ["adam", "mlp"]}
      >>> numbers = {key({"rule": r}, s): v for r, s, v in [("adam", 0, 2.0), ("adam", 1, 4.0),
      ...                                                   ("mlp", 0, 1.0), ("mlp", 1, 2.0)]}
      >>> mlp = effects(axes, list(numbers), numbers)[1]
      >>> mlp.mean, mlp.effect, round(mlp.half_width, 2)
      (1.5, -1.5, 6.35)
    """
    return [
        _effect(axis, label, labels[0], planned, table) for axis, labels in axes.items() for label in labels
    ]


def _effect(axis: str, label: str, reference: str, planned: Sequence[Key], table: Table) -> Effect:
    pairs = []
    there = set(planned)
    for labels, seed in planned:
        if dict(labels).get(axis) == label:
            other = key(dict(labels) | {axis: reference}, seed)
            if other in there:
                rest = tuple(pair for pair in labels if pair[0] != axis)
                pairs.append((seed, rest, (labels, seed), other))
    seeds = sorted({pair[0] for pair in pairs})
    rests = sorted({pair[1] for pair in pairs})
    ours, theirs = (np.full((len(seeds), len(rests)), math.nan) for _ in range(2))
    for seed, rest, mine, other in pairs:
        at = seeds.index(seed), rests.index(rest)
        ours[at], theirs[at] = table.get(mine, math.nan), table.get(other, math.nan)
    whole = np.isfinite(ours) & np.isfinite(theirs)
    missing = len(pairs) - int(whole.sum())
    rows, columns = complete(whole)
    if not (len(rows) and len(columns)):
        return Effect(axis, label, reference, math.nan, math.nan, math.nan, 0, 0, missing)
    ours, theirs = ours[np.ix_(rows, columns)], theirs[np.ix_(rows, columns)]
    each = (ours - theirs).mean(axis=1)
    half = half_width(each) if label != reference else math.nan
    numbers = float(ours.mean()), float(each.mean()), half
    return Effect(axis, label, reference, *numbers, len(rows), len(columns), missing)


def half_width(values: np.ndarray) -> float:
    """Half of Student's interval of a mean; NaN for fewer than two values.

    Example:
      >>> round(half_width(np.array([1.0, 2.0, 3.0])), 3)
      2.484
    """
    if len(values) < 2:
        return math.nan
    return float(
        stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    )


def complete(whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows and columns that are left when those that lack most are taken out one by one.

    Args:
      whole: whether there is a number, ``[rows, columns]``.

    Example:
      >>> rows, columns = complete(np.array([[True, True], [True, False], [True, True]]))
      >>> rows.tolist(), columns.tolist()
      ([0, 2], [0, 1])
    """
    rows, columns = np.arange(whole.shape[0]), np.arange(whole.shape[1])
    while len(rows) and len(columns) and not (part := whole[np.ix_(rows, columns)]).all():
        by_row, by_column = 1 - part.mean(axis=1), 1 - part.mean(axis=0)
        if by_row.max() >= by_column.max():
            rows = np.delete(rows, by_row.argmax())
        else:
            columns = np.delete(columns, by_column.argmax())
    return rows, columns
