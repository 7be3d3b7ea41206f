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

from celo_nnx.errors import UserError, require, unknown

SMOOTHING = 25  # the average's time constant is K / 25 steps: 4 % of a run
LONGEST = 4  # Adam is trained for up to this many times the steps that optimizers are compared at
# Lengths of Adam's runs in multiples of K, by schedule. At a constant rate a long run passes through all
# shorter ones. A run whose rate decays shows what its length reaches at its end only: each length is a run.
LENGTHS = {
    "constant": (1, LONGEST),
    "cosine": (0.25, 0.5, 2**-0.5, 1, 2**0.5, 2, 2**1.5, LONGEST),
}
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


def adam_steps(schedule: str, steps: int) -> tuple[int, ...]:
    """How long Adam's runs are: ``LENGTHS[schedule]`` times ``K``, rounded, without repetitions.

    Args:
      schedule: a key of :data:`LENGTHS`.
      steps: ``K``.

    Returns:
      ``K``, and then the others, ascending: rates of the others are tried around the best for ``K``.

    Raises:
      UserError: an unknown schedule.

    Example:
      >>> adam_steps("constant", 20), adam_steps("cosine", 20)
      ((20, 80), (20, 5, 10, 14, 28, 40, 57, 80))
    """
    if schedule not in LENGTHS:
        raise unknown("schedule", schedule, LENGTHS)
    others = {max(1, round(times * steps)) for times in LENGTHS[schedule]} - {steps}
    return (steps, *sorted(others))


def envelope(runs: Sequence[np.ndarray], steps: int) -> np.ndarray:
    """The lowest loss that Adam reaches within each number of steps at constant learning rates.

    Let ``m_r(j)`` be the median over seeds of the smoothed loss after ``j`` steps of the runs of one learning
    rate and one length (one ``r``). The envelope is ``E(k) = min over r, min over j <= min(k, length of r) of
    m_r(j)``. The median, and not each seed's own minimum, because the least of several noisy runs is lower
    than any of them: Adam's speedup over itself would be below 1.

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
    lowest = np.full(_longest(runs, steps), np.inf)
    for run in runs:
        medians = np.median(smooth(run, steps), axis=1).min(axis=0)
        lowest[: len(medians)] = np.minimum(lowest[: len(medians)], medians)
    return np.minimum.accumulate(lowest)


def envelope_of_ends(runs: Sequence[np.ndarray], steps: int) -> np.ndarray:
    """The loss at the end of Adam's run of each number of steps, under a schedule that ends with the run.

    A rate that is still to decay keeps the loss up, so the middle of a run says nothing about a shorter run,
    and only ends count. For a length ``n``, let ``e(n)`` be the least over learning rates of the median over
    seeds of ``L``, every run smoothed by its own length's time constant, as ``L`` is for ``K``. With ``e(1)``
    the median first loss, before any update::

        E(n) = min over lengths m <= n of e(m)                                        at the lengths
        E(k) = E(a) + (E(b) - E(a)) log(k / a) / log(b / a)                for a < k < b, neighbours

    Between the lengths of :data:`LENGTHS` a loss ``~ k^-p`` lies below its chord, by up to about ``(p log(b /
    a))^2 / 8`` of itself, so speedups are too high by up to about ``p log(b / a)^2 / 8``: below 1 % for
    factors of ``sqrt(2)`` and ``p <= 0.6``, four times that between ``K / 4`` and ``K / 2``. Below ``K / 4``
    the envelope is a line from the first loss, and a speedup only tells that it is below a quarter.

    Args:
      runs: arrays ``[n_lr, n_seeds, length]`` of Adam's losses, lengths up to ``LONGEST * steps``.
      steps: ``K``, at which optimizers are compared.

    Returns:
      ``[longest length]`` float64, ``E(1), E(2), ...``; never ascending, all ``inf`` where no run began with
      a finite loss.

    Raises:
      UserError: no runs, or a run of more than ``LONGEST * steps`` steps.

    Example:
      >>> runs = np.array([[[3.0, 2.5, 2.0]]]), np.array([[[3.0, 3.0, 3.0, 3.0, 3.0, 1.0]]])
      >>> envelope_of_ends(runs, steps=6).round(3).tolist()
      [3.0, 2.369, 2.0, 1.585, 1.263, 1.0]
    """
    logs = np.log(np.arange(1, _longest(runs, steps) + 1))
    ends = {1: min(np.median(final_loss(run[..., :1]), axis=1).min() for run in runs)}
    for run in runs:
        end, n = np.median(final_loss(run), axis=1).min(), np.shape(run)[-1]
        ends[n] = min(end, ends.get(n, np.inf))
    at = np.array(sorted(ends))
    lowest = np.minimum.accumulate([ends[n] for n in at])
    if not np.isfinite(lowest[0]):  # no run began with a finite loss, so none ends with one
        return np.full(len(logs), np.inf)
    return np.minimum.accumulate(np.interp(logs, logs[at - 1], lowest))  # rounding may ascend


def speedup(final: np.ndarray, adam: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """How many times the steps Adam needs for the same loss: ``K_Adam(L) / K``.

    ``K_Adam(L)`` is the first step at which Adam's :func:`envelope`, or :func:`envelope_of_ends` under a
    schedule that ends with the run, is at or below ``L``. Where it never is, the speedup is at least the
    envelope's length over ``K``, which is taken for it and flagged. A diverged run has speedup 0 and no flag.

    Two small biases come with :func:`envelope`. The average lags by its time constant, so a curve that is
    Adam's at half the steps has about ``2 - 1 / SMOOTHING``. And a noisy curve first reaches a level a little
    early: in simulated runs of 1000 steps with 10 to 30 % noise, Adam's speedup over itself was 0.95
    to 1.00 on average, with a standard deviation of 0.03 to 0.1. Ends have neither: every one of them lags by
    the same part of its run, and the median seed's own speedup is 1 unless a shorter run ended lower.

    Args:
      final: ``[...]`` final losses of the optimizer after ``steps``.
      adam: ``[length]`` the envelope; ``LONGEST * steps`` long, unless Adam was trained for less.
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


def _longest(runs: Sequence[np.ndarray], steps: int) -> int:
    """The longest run's length, checked."""
    require(len(runs) >= 1, "runs", len(runs), "at least one array")
    longest = max(np.shape(run)[-1] for run in runs)
    require(longest <= LONGEST * steps, "length of Adam's runs", longest, f"<= {LONGEST * steps}")
    return longest


def _diverged_to_inf(losses: np.ndarray) -> np.ndarray:
    losses = np.asarray(losses, np.float64)
    return np.where(np.isfinite(losses), losses, np.inf)
