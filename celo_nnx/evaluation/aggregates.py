"""Aggregates of scores over tasks and seeds, with stratified bootstrap intervals. Numpy and scipy.

Scores are ``[n_seeds, n_tasks]``, higher is better, every run in its place: a diverged one is 0, never left
out. A bootstrap sample draws ``n_seeds`` seeds with replacement within every task, independently of the
others (the tasks are a fixed suite, so they are not resampled); an interval lies between percentiles of the
aggregate over such samples. With fewer than :data:`FEWEST` seeds there is no interval.

Of few seeds the bootstrap knows too little spread: with 3 to 5 of them, intervals of nominally 95 % held the
truth in 83 to 85 % of simulations. This is rliable's interval, with its lack at small samples.

Source: Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice",
arXiv:2108.13264.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy import stats

from celo_nnx.errors import require, unknown

RESAMPLES = 2000
CONFIDENCE = 0.95
FEWEST = 3  # seeds; the intervals of two held the truth in 72 to 78 % of simulations
TOO_FEW = f"no interval: it takes at least {FEWEST} seeds"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number, or an array of numbers, with its interval.

    Attributes:
      value: the aggregate.
      low: lower end of the interval; None where there is none.
      high: upper end; None where there is none.
      note: empty, or why there is no interval.
    """

    value: float | np.ndarray
    low: float | np.ndarray | None
    high: float | np.ndarray | None
    note: str = ""


def iqm(scores: np.ndarray) -> np.ndarray:
    """The interquartile mean over the last two axes: that of all ``n`` runs but ``floor(n/4)`` at each end.

    Example:
      >>> float(iqm(np.array([[0.0, 1.0], [2.0, 9.0]])))
      1.5
    """
    return stats.trim_mean(scores.reshape(*scores.shape[:-2], -1), 0.25, axis=-1)


def median(scores: np.ndarray) -> np.ndarray:
    """The median over tasks of the mean over seeds."""
    return np.median(scores.mean(axis=-2), axis=-1)


def mean(scores: np.ndarray) -> np.ndarray:
    """The mean over tasks and seeds."""
    return scores.mean(axis=(-2, -1))


STATISTICS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"iqm": iqm, "median": median, "mean": mean}


def aggregate(
    scores: np.ndarray,
    statistic: str = "iqm",
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:
    """One number for an optimizer on a suite.

    Args:
      scores: ``[n_seeds, n_tasks]``.
      statistic: a key of :data:`STATISTICS`.
      resamples: bootstrap samples.
      confidence: probability of the interval, between 0 and 1.
      seed: of the resampling.

    Returns:
      The aggregate with its interval.

    Raises:
      UserError: an unknown statistic, or scores that are not a finite matrix.

    Example:
      >>> found = aggregate(np.array([[1.0, 2.0], [1.0, 4.0], [1.0, 6.0]]), "mean")
      >>> float(found.value), float(found.low), float(found.high)
      (2.5, 1.5, 3.5)
    """
    scores, function = _checked(scores), _function(statistic)
    value = float(function(scores))
    if len(scores) < FEWEST:
        return Estimate(value, None, None, TOO_FEW)
    low, high = _ends(function(_resampled(scores, resamples, seed)), confidence)
    return Estimate(value, float(low), float(high))


def difference(
    x: np.ndarray,
    y: np.ndarray,
    statistic: str = "iqm",
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:
    """The aggregate of ``x`` less that of ``y``, over the same tasks.

    Row ``i`` of as many rows is the same seed in both, which fixes a run's start and batches: a sample then
    takes the same seeds of both. Otherwise seeds of ``x`` and ``y`` are resampled independently.

    Args:
      x: ``[n_x, n_tasks]``.
      y: ``[n_y, n_tasks]``.
      statistic: a key of :data:`STATISTICS`.
      resamples: bootstrap samples.
      confidence: of the interval.
      seed: of the resampling.

    Returns:
      The difference with its interval; none where ``x`` or ``y`` has fewer than :data:`FEWEST` seeds.

    Raises:
      UserError: an unknown statistic, scores that are not finite matrices, or other numbers of tasks.

    Example:
      >>> x = np.array([[1.0, 2.0], [3.0, 8.0], [5.0, 6.0]])
      >>> found = difference(x + 0.5, x)
      >>> float(found.value), float(found.low), float(found.high)
      (0.5, 0.5, 0.5)
    """
    (x, y), function = _pair(x, y), _function(statistic)
    value = float(function(x) - function(y))
    if min(len(x), len(y)) < FEWEST:
        return Estimate(value, None, None, TOO_FEW)
    # One seed draws the same rows of both where they have as many.
    of_y = seed if len(x) == len(y) else seed + 1
    samples = function(_resampled(x, resamples, seed)) - function(_resampled(y, resamples, of_y))
    low, high = _ends(samples, confidence)
    return Estimate(value, float(low), float(high))


def profile(
    scores: np.ndarray,
    thresholds: np.ndarray,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:
    """The performance profile: which part of all runs scores above each threshold.

    Args:
      scores: ``[n_seeds, n_tasks]``.
      thresholds: ``[n]``.
      resamples: bootstrap samples.
      confidence: of the interval at each threshold, not of all of them together.
      seed: of the resampling.

    Returns:
      Arrays ``[n]``.

    Example:
      >>> profile(np.array([[0.5, 1.0, 1.5, 2.0]]), np.array([0.0, 1.0, 3.0])).value.tolist()
      [1.0, 0.5, 0.0]
    """
    scores, thresholds = _checked(scores), np.asarray(thresholds, np.float64)

    def parts(runs: np.ndarray) -> np.ndarray:
        """``[..., n_seeds, n_tasks]`` -> ``[..., n]``."""
        return np.stack([(runs > threshold).mean(axis=(-2, -1)) for threshold in thresholds], axis=-1)

    value = parts(scores)
    if len(scores) < FEWEST:
        return Estimate(value, None, None, TOO_FEW)
    return Estimate(value, *_ends(parts(_resampled(scores, resamples, seed)), confidence))


def improvement(
    x: np.ndarray,
    y: np.ndarray,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:
    """The probability that a run of ``x`` scores higher than one of ``y`` on the same task, ties half.

    ``mean over tasks of (#{x_i > y_j} + #{x_i = y_j} / 2) / (n_x n_y)``, which is Mann and Whitney's U of
    each task, scaled. Seeds of ``x`` and ``y`` are resampled independently.

    Args:
      x: ``[n_x, n_tasks]``.
      y: ``[n_y, n_tasks]``.
      resamples: bootstrap samples.
      confidence: of the interval.
      seed: of the resampling.

    Returns:
      The probability with its interval; none where ``x`` or ``y`` has fewer than
      :data:`FEWEST` seeds.

    Example:
      >>> improvement(np.array([[2.0, 1.0]]), np.array([[1.0, 1.0]])).value
      0.75
    """
    x, y = _pair(x, y)
    wins = (x[:, None] > y[None]) + 0.5 * (x[:, None] == y[None])
    value = float(wins.mean())
    if min(len(x), len(y)) < FEWEST:
        return Estimate(value, None, None, TOO_FEW)
    generator, tasks = np.random.default_rng(seed), x.shape[1]
    # A sample is how often it holds each seed; with these counts no sample's pairs need be formed.
    of_x, of_y = (
        generator.multinomial(n, np.full(n, 1 / n), size=(resamples, tasks)) for n in (len(x), len(y))
    )
    samples = np.einsum("btx,xyt,bty->b", of_x, wins, of_y, optimize=True) / wins.size
    low, high = _ends(samples, confidence)
    return Estimate(value, float(low), float(high))


def _checked(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    good = scores.ndim == 2 and scores.size >= 1 and bool(np.isfinite(scores).all())
    require(good, "scores", scores.shape, "[n_seeds, n_tasks] finite numbers, at least one")
    return scores


def _pair(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = _checked(x), _checked(y)
    require(x.shape[1] == y.shape[1], "number of tasks", y.shape[1], f"{x.shape[1]}, as of the other")
    return x, y


def _function(statistic: str) -> Callable[[np.ndarray], np.ndarray]:
    if statistic not in STATISTICS:
        raise unknown("statistic", statistic, STATISTICS)
    return STATISTICS[statistic]


def _resampled(scores: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Bootstrap samples ``[resamples, n_seeds, n_tasks]``."""
    require(resamples >= 1, "resamples", resamples, "an integer >= 1")
    index = np.random.default_rng(seed).integers(0, len(scores), (resamples, *scores.shape))
    return np.take_along_axis(scores[None], index, axis=1)


def _ends(samples: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of the percentile interval over axis 0."""
    require(0 < confidence < 1, "confidence", confidence, "between 0 and 1")
    tail = 50 * (1 - confidence)
    low, high = np.percentile(samples, [tail, 100 - tail], axis=0)
    return low, high
