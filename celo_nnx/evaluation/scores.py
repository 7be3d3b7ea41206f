"""Scores of single runs against Adam: final-loss ratio and speedup. Numpy and scipy.

Losses are smoothed by an exponential moving average with bias correction. For a task of ``K`` steps::

    s_t = sum_(j <= t) d^(t-j) x_j / sum_(j <= t) d^(t-j),      d = 1 - min(1, SMOOTHING / K)

so it averages over about the last ``K / SMOOTHING`` losses (all losses alike in the first few steps). ``L``
is its value at the run's end. A run is diverged from its first non-finite loss on, and ``s`` is infinite from
there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import signal

from celo_nnx.errors import UserError, require

SMOOTHING = 25  # the average's time constant is K / 25 steps: 4 % of a run
LONGEST = 4  # Adam is trained for up to this many times the steps that optimizers are compared at
# A loss cannot be told from its floor by less than float32 resolves; so no score is above 1 / RESOLUTION.
RESOLUTION = float(np.finfo(np.float32).eps)


def smooth(losses: np.ndarray, steps: int | None = None) -> np.ndarray:
    """The exponential moving average of the module's docstring at every step.

    Args:
      losses: ``[..., n]``.
      steps: ``K``, which sets the average's time constant; ``n`` by default. A longer run that is compared
        with runs of ``K`` steps is smoothed like those.

    Returns:
      ``[..., n]`` float64; ``inf`` from a run's first non-finite loss on.

    Example:
      >>> smooth(np.array([4.0, 2.0]), steps=100).round(3).tolist()
      [4.0, 2.857]
    """
    losses = np.asarray(losses, np.float64)
    require(losses.ndim >= 1 and losses.shape[-1] >= 1, "losses' shape", losses.shape, "at least one step")
    steps = losses.shape[-1] if steps is None else steps
    require(steps >= 1, "steps", steps, "an integer >= 1")
    decay, finite = 1.0 - min(1.0, SMOOTHING / steps), np.isfinite(losses)
    values = np.where(finite, losses, 0.0)  # 0 times inf would be NaN
    # y_t = x_t + d y_(t-1), of the losses and of ones.
    total, weight = (signal.lfilter([1.0], [1.0, -decay], x) for x in (values, np.ones(values.shape[-1])))
    return np.where(np.logical_and.accumulate(finite, axis=-1), total / weight, np.inf)


def final_loss(losses: np.ndarray, steps: int | None = None) -> np.ndarray:
    """``L``, the last value of :func:`smooth`, ``[...]`` float64; ``inf`` for a diverged run.

    Example:
      >>> float(final_loss(np.array([9.0] * 9 + [1.0]))), round(float(final_loss(np.full(500, 0.25))), 9)
      (1.0, 0.25)
    """
    return smooth(losses, steps)[..., -1]


def final_loss_score(adam: np.ndarray, final: np.ndarray, floor: float | None = None) -> np.ndarray:
    """The ratio ``L_Adam / L`` of the runs of one task; above 1 is better than Adam.

    With a known floor, the least loss that the task allows, both losses are counted from it, and by at least
    what float32 resolves there. A diverged run scores 0. Where Adam's own run of a seed diverged, the median
    of its seeds stands in; where that diverged too, every finite run gets the largest score there is, ``1 /
    RESOLUTION``.

    Args:
      adam: ``[n_seeds]`` final losses of Adam at the learning rate tuned for this number of steps.
      final: ``[n_seeds]`` final losses of the optimizer, of the same seeds in the same order.
      floor: the task's least loss, where known.

    Returns:
      ``[n_seeds]``, from 0 to ``1 / RESOLUTION``.

    Raises:
      UserError: the shapes differ, a loss is negative and no floor was given, or one lies below the floor by
        more than a hundredth of Adam's distance from it, as noise can make it.

    Example:
      >>> final_loss_score(np.array([1.0, 1.0, 1.0]), np.array([0.5, 1.0, np.inf])).tolist()
      [2.0, 1.0, 0.0]
    """
    adam, final = (_diverged_to_inf(x) for x in (adam, final))
    require(adam.shape == final.shape, "shape of the final losses", final.shape, f"Adam's, {adam.shape}")
    if floor is None and min(adam.min(initial=np.inf), final.min(initial=np.inf)) < 0:
        raise UserError("a final loss is negative, so losses have no ratio: give the task's floor")
    floor = 0.0 if floor is None else floor
    least = RESOLUTION * max(1.0, abs(floor)) if floor else np.finfo(np.float64).tiny
    adam = np.where(np.isfinite(adam), adam, np.median(adam))
    margin = least + 0.01 * np.abs(adam - floor).max(initial=0.0, where=np.isfinite(adam))
    if min(adam.min(initial=np.inf), final.min(initial=np.inf)) < floor - margin:
        raise UserError(f"a final loss lies below the task's floor, {floor:.6g}, so losses have no ratio")
    with np.errstate(over="ignore", invalid="ignore"):
        ratio = np.maximum(adam - floor, least) / np.maximum(final - floor, least)
    return np.where(np.isfinite(final), np.minimum(ratio, 1 / RESOLUTION), 0.0)


def envelope(runs: Sequence[np.ndarray], steps: int) -> np.ndarray:
    """The lowest loss that Adam reaches within each number of steps, over learning rates and lengths.

    Let ``m_r(j)`` be the median over seeds of the smoothed loss after ``j`` steps of the runs of one learning
    rate and one length (one ``r``). The envelope is ``E(k) = min over r, min over j <= min(k, length of r) of
    m_r(j)``. A constant learning rate needs one length, ``LONGEST steps``; a schedule that ends with the run
    needs several. The median, and not each seed's own minimum, because the least of several noisy runs is
    lower than any of them: Adam's speedup over itself would be below 1.

    Args:
      runs: arrays ``[n_lr, n_seeds, length]`` of Adam's losses, lengths up to ``LONGEST * steps``.
      steps: ``K``, at which optimizers are compared; all runs are smoothed by its time constant.

    Returns:
      ``[longest length]`` float64, ``E(1), E(2), ...``; never ascending, ``inf`` where all have diverged.

    Raises:
      UserError: no runs, or a run of more than ``LONGEST * steps`` steps.

    Example:
      >>> envelope([np.array([[[3.0, 1.0, 2.0]]]), np.array([[[4.0, 2.0]]])], steps=3).tolist()
      [3.0, 1.0, 1.0]
    """
    require(len(runs) >= 1, "runs", len(runs), "at least one array")
    lengths = [np.shape(run)[-1] for run in runs]
    require(max(lengths) <= LONGEST * steps, "length of Adam's runs", max(lengths), f"<= {LONGEST * steps}")
    lowest = np.full(max(lengths), np.inf)
    for run in runs:
        medians = np.median(smooth(run, steps), axis=1).min(axis=0)
        lowest[: len(medians)] = np.minimum(lowest[: len(medians)], medians)
    return np.minimum.accumulate(lowest)


def speedup(final: np.ndarray, adam: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """How many times the steps Adam needs for the same loss: ``K_Adam(L) / K``.

    ``K_Adam(L)`` is the first step at which Adam's :func:`envelope` is at or below ``L``. Where it never is,
    the speedup is at least the envelope's length over ``K``, which is taken for it and flagged. A diverged
    run has speedup 0 and no flag.

    Two small biases come with the definition. The average lags by its time constant, so a curve that is
    Adam's at half the steps has about ``2 - 1 / SMOOTHING``. And a noisy curve first reaches a level a little
    early: in simulated runs of 1000 steps with 10 to 30 % noise, Adam's speedup over itself was 0.95
    to 1.00 on average, with a standard deviation of 0.03 to 0.1.

    Args:
      final: ``[...]`` final losses of the optimizer after ``steps``.
      adam: ``[length]`` Adam's envelope; ``LONGEST * steps`` long, unless Adam was trained for less.
      steps: ``K``.

    Returns:
      (speedups ``[...]``, whether each is only a lower bound ``[...]``).

    Example:
      >>> values, capped = speedup(np.array([2.0, 0.5, np.inf]), np.array([3.0, 2.0, 1.0, 1.0]), steps=1)
      >>> values.tolist(), capped.tolist()
      ([2.0, 4.0, 0.0], [False, True, False])
    """
    final = _diverged_to_inf(final)
    require(1 <= len(adam) <= LONGEST * steps, "length of the envelope", len(adam), f"1 to {LONGEST * steps}")
    # The envelope never ascends, so the values above L lead it.
    above = np.searchsorted(-np.asarray(adam, np.float64), -final, side="left")
    capped = (above == len(adam)) & np.isfinite(final)
    needed = np.minimum(above + 1, len(adam))
    return np.where(np.isfinite(final), needed / steps, 0.0), capped


def _diverged_to_inf(losses: np.ndarray) -> np.ndarray:
    losses = np.asarray(losses, np.float64)
    return np.where(np.isfinite(losses), losses, np.inf)
