"""Long series made short enough to draw: running means, bins, extremes. NaN is a hole."""

from __future__ import annotations

import numpy as np

WINDOW = 200  # meta-iterations that a loss is averaged over
SHARE = 25  # a curve is smoothed over this share of its meta-iterations


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the last ``window`` values that leaves NaN out.

    At the start it is over fewer values, but over a tenth of the window at least: fewer are no mean.

    Args:
      values: ``[n]``.
      window: at least 1.

    Returns:
      ``[n]``; NaN where there is nothing to average.

    Example:
      >>> running_mean(np.array([1.0, 3.0, np.nan, 5.0]), 2).tolist()
      [1.0, 2.0, 3.0, 5.0]
    """
    known = np.isfinite(values)
    # A common offset keeps the sums small, and with them the error of their differences.
    offset = np.mean(values[known]) if known.any() else 0.0
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values - offset, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(end - window, 0)
    count = counts[end] - counts[begin]
    mean = offset + (sums[end] - sums[begin]) / np.maximum(count, 1)
    return np.where((count > 0) & (end >= min(window // 10, len(values))), mean, np.nan)


def mean(values: np.ndarray) -> float:
    """The mean of the finite values, NaN where there is none.

    Example:
      >>> mean(np.array([1.0, np.nan, 2.0])), mean(np.array([]))
      (1.5, nan)
    """
    known = values[np.isfinite(values)]
    return float(np.mean(known)) if len(known) else float("nan")


def resampled(values: np.ndarray, count: int) -> np.ndarray:
    """Returns ``[count]`` values: means of equal shares, or a line through fewer values than that.

    Example:
      >>> resampled(np.array([1.0, 3.0, 5.0, np.nan]), 2).tolist()
      [2.0, 5.0]
      >>> resampled(np.array([1.0, 3.0]), 3).tolist()
      [1.0, 2.0, 3.0]
    """
    if len(values) <= count:
        if len(values) == 0:
            return np.full(count, np.nan)
        return np.interp(np.linspace(0, len(values) - 1, count), np.arange(len(values)), values)
    edges = np.linspace(0, len(values), count + 1).astype(int)
    return np.array([mean(values[a:b]) for a, b in zip(edges, edges[1:], strict=False)])


def even(length: int, most: int) -> np.ndarray:
    """Returns at most ``most`` (>= 2) evenly spread places of a series, its last one among them.

    Example:
      >>> even(5, 3).tolist(), even(2, 3).tolist(), even(0, 3).tolist()
      ([0, 2, 4], [0, 1], [])
    """
    return np.unique(np.linspace(0, length - 1, min(length, most)).round().astype(int))


def extremes(values: np.ndarray, most: int) -> np.ndarray:
    """Returns at most ``most`` (>= 2) places of a series that look like the whole: each share's extremes.

    Example:
      >>> extremes(np.array([1.0, 9.0, 2.0, 3.0, 0.0, np.nan]), 4).tolist()
      [0, 1, 3, 4]
    """
    if len(values) <= most:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), most // 2 + 1).astype(int)
    places = []
    for a, b in zip(edges, edges[1:], strict=False):
        share = values[a:b]
        known = np.isfinite(share).any()
        places += [a + int(f(share)) for f in (np.nanargmin, np.nanargmax)] if known else [a]
    return np.unique(places)
