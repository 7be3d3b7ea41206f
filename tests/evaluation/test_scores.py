"""Scores by hand from curves, and what must hold of them: Adam is 1, twice as fast is 2, diverged is 0."""

import numpy as np
import pytest

from celo_nnx.errors import UserError
from celo_nnx.evaluation import scores
from celo_nnx.evaluation.baselines import SCHEDULES

K = 1000


def power_law(steps, stretch=1.0):
    """A curve without noise; ``stretch`` times as fast."""
    return (stretch * np.arange(1, steps + 1) + 5.0) ** -0.5 + 0.1


def noisy(seed, shape):
    generator = np.random.default_rng(seed)
    return power_law(shape[-1]) * generator.lognormal(0.0, 0.1, shape)


def test_smoothing_is_the_stated_average():
    losses = noisy(0, (2, 70))
    decay = 1 - scores.SMOOTHING / 200
    by_hand = np.empty_like(losses)
    for t in range(70):
        weights = decay ** np.arange(t, -1, -1.0)
        by_hand[:, t] = (losses[:, : t + 1] * weights).sum(1) / weights.sum()
    np.testing.assert_allclose(scores.smooth(losses, 200), by_hand, rtol=1e-12)
    np.testing.assert_allclose(scores.final_loss(losses, 200), by_hand[:, -1], rtol=1e-12)
    # By default the constant is that of the curve's own length; runs of up to 25 steps are not smoothed.
    np.testing.assert_allclose(scores.final_loss(losses), scores.smooth(losses, 70)[:, -1], rtol=1e-12)
    np.testing.assert_array_equal(scores.smooth(losses, 25), losses)


@pytest.mark.parametrize("steps", [20, 400])
@pytest.mark.parametrize("bad", [np.inf, np.nan, -np.inf])
def test_a_run_is_infinite_from_its_first_bad_loss_on(steps, bad):
    losses = noisy(1, (2, 40))
    losses[0, 7] = bad
    smooth = scores.smooth(losses, steps)
    assert np.isfinite(smooth[0, :7]).all() and np.isposinf(smooth[0, 7:]).all()
    np.testing.assert_array_equal(np.isposinf(scores.final_loss(losses, steps)), [True, False])
    assert np.isfinite(smooth[1]).all()


def test_final_loss_score_is_the_ratio_above_the_floor():
    adam, final = np.array([1.0, 2.0, 3.0]), np.array([0.5, 4.0, np.nan])
    np.testing.assert_allclose(scores.final_loss_score(adam, final), [2.0, 0.5, 0.0])
    np.testing.assert_allclose(scores.final_loss_score(adam, final, 0.25), [3.0, 1.75 / 3.75, 0.0])
    # On the floor and below it, what float32 can resolve stands for the excess.
    at_floor = scores.final_loss_score(np.array([1.5, 1.0, 1.0]), np.array([1.0, 0.999, 1.5]), 1.0)
    np.testing.assert_allclose(at_floor, [0.5 / scores.RESOLUTION, 1.0, scores.RESOLUTION / 0.5])
    np.testing.assert_allclose(scores.final_loss_score(adam - 5, final - 5, -5.0), [2.0, 0.5, 0.0])
    with pytest.raises(UserError, match="lies below the task's floor, 1, so"):
        scores.final_loss_score(np.array([1.5, 1.5]), np.array([1.2, 0.99]), 1.0)
    with pytest.raises(UserError, match="floor"):
        scores.final_loss_score(np.array([-1.0]), np.array([1.0]))
    with pytest.raises(UserError, match="shape"):
        scores.final_loss_score(np.ones(2), np.ones(3))


def test_adams_own_divergence_neither_drops_nor_favours():
    score = scores.final_loss_score(np.array([np.inf, 1.0, 3.0]), np.array([1.5, 1.0, np.inf]))
    np.testing.assert_allclose(score, [2.0, 1.0, 0.0])  # the median of inf, 1, 3 stands in for the first
    hopeless = scores.final_loss_score(np.full(2, np.inf), np.array([1.0, np.inf]))
    np.testing.assert_allclose(hopeless, [1 / scores.RESOLUTION, 0.0])


def test_envelope_by_hand():
    runs = [noisy(2, (3, 5, 4 * K // 10)), noisy(3, (2, 5, K // 10)) * 0.9]
    found = scores.envelope(runs, K // 10)
    lowest, by_hand = np.inf, []
    for k in range(4 * K // 10):
        for run in runs:
            smooth = scores.smooth(run, K // 10)
            if k < run.shape[-1]:
                lowest = min(lowest, min(np.median(smooth[lr, :, k]) for lr in range(len(run))))
        by_hand.append(lowest)
    np.testing.assert_allclose(found, by_hand, rtol=1e-12)
    for order in ([1, 0], [0, 1, 0]):
        np.testing.assert_array_equal(scores.envelope([runs[i] for i in order], K // 10), found)
    mixed = [run[::-1, [3, 1, 0, 4, 2]] for run in runs]
    np.testing.assert_array_equal(scores.envelope(mixed, K // 10), found)


def test_adam_over_itself_is_one():
    losses = power_law(4 * K)[None, None]
    final = scores.final_loss(losses[..., :K])[0]
    assert scores.final_loss_score(final, final).tolist() == [1.0]
    values, capped = scores.speedup(final, scores.envelope([losses], K), K)
    assert values.tolist() == [1.0] and not capped.any()


def test_adam_over_itself_is_one_within_seed_noise():
    seeds = 20
    levels = np.array([1.3, 1.0, 1.1])[:, None, None]  # three learning rates, the second the best
    losses = noisy(4, (3, seeds, 4 * K)) * levels
    final = scores.final_loss(losses[1, :, :K])
    values, capped = scores.speedup(final, scores.envelope([losses], K), K)
    assert abs(np.median(values) - 1) < 0.15 and values.min() < 1 < values.max() and not capped.any()


def test_half_the_steps_are_a_speedup_of_two():
    adam = power_law(4 * K)[None, None]
    values, capped = scores.speedup(
        scores.final_loss(power_law(K, stretch=2.0)[None]), scores.envelope([adam], K), K
    )
    # The average lags by its time constant, 4 % of K, in either run's own steps.
    assert values == pytest.approx([2.0], abs=1.5 / scores.SMOOTHING) and not capped.any()
    slow, _ = scores.speedup(
        scores.final_loss(power_law(K, stretch=0.5)[None]), scores.envelope([adam], K), K
    )
    assert slow == pytest.approx([0.5], abs=1.5 / scores.SMOOTHING)


def test_speedup_is_capped_and_says_so():
    adam = scores.envelope([power_law(4 * K)[None, None]], K)
    final = np.array([0.05, np.inf, adam[-1], adam[-2], adam[0] + 1])
    values, capped = scores.speedup(final, adam, K)
    np.testing.assert_allclose(values, [4.0, 0.0, 4.0, 4.0 - 1 / K, 1 / K])
    np.testing.assert_array_equal(capped, [True, False, False, False, False])
    # Adam that was trained for less bounds it by less.
    values, capped = scores.speedup(np.array([0.05]), adam[: 2 * K], K)
    assert values.tolist() == [2.0] and capped.all()
    with pytest.raises(UserError, match="length"):
        scores.envelope([np.ones((1, 1, 4 * K + 1))], K)


def test_all_diverged():
    lost = np.full((2, 3, K), np.inf)
    final = scores.final_loss(lost[0])
    assert scores.final_loss_score(final, final).tolist() == [0.0] * 3
    values, capped = scores.speedup(final, scores.envelope([lost], K), K)
    assert values.tolist() == [0.0] * 3 and not capped.any()
    values, capped = scores.speedup(np.ones(3), scores.envelope([lost], K), K)
    assert values.tolist() == [1.0] * 3 and capped.all()


def decaying(generator, steps, n_seeds, speed=1.0, n_lr=3):
    """Runs under a decaying rate: an end is ``0.05 + (speed n)^-0.4``, and what comes before lies higher."""
    at = np.arange(1, steps + 1)
    losses = (0.05 + (speed * (at + 5.0)) ** -0.4) * (1.5 - 0.5 * at / steps)
    levels = np.array([1.0, 1.2, 1.1])[:n_lr, None, None]
    return losses * levels * generator.lognormal(0.0, 0.01, (n_lr, n_seeds, steps))


def ends_of_adam(seed, steps=400, n_seeds=5):
    generator = np.random.default_rng(seed)
    lengths = scores.adam_steps("cosine", steps)
    return scores.envelope_of_ends([decaying(generator, n, n_seeds) for n in lengths], steps)


def test_every_schedule_has_lengths_and_each_is_run_once():
    assert set(scores.LENGTHS) == set(SCHEDULES)
    for lengths in scores.LENGTHS.values():
        assert 1 in lengths and max(lengths) == scores.LONGEST
    assert scores.adam_steps("cosine", 2000) == (2000, 500, 1000, 1414, 2828, 4000, 5657, 8000)
    assert scores.adam_steps("cosine", 1) == (1, 2, 3, 4)
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        scores.adam_steps("cosin", 20)


def test_envelope_of_ends_by_hand():
    def run(*medians):
        """At each rate three seeds around a median; too short to be smoothed, 9 at first and 0 amid."""
        return np.array([[[9.0, 0.0, m + s] for s in (0.5, 0.0, -0.1)] for m in medians])

    def long(run, n):
        return np.concatenate([run[..., :1], np.zeros((*run.shape[:2], n - 3)), run[..., 1:]], axis=-1)

    runs = [run(3.0, 4.0), long(run(5.0), 6), long(run(2.0, 1.0, np.nan), 12)]
    found = scores.envelope_of_ends(runs, 3)
    # Ends at 3, 6 and 12 steps: 3, 5 (so still 3) and 1.
    expected = [9.0, 9 - 6 * np.log(2) / np.log(3), 3, 3, 3, 3]
    expected += [3 - 2 * np.log2(k / 6) for k in range(7, 13)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found[2] == 3.0 and found[11] == 1.0 and (np.diff(found) <= 0).all()
    for order in ([2, 0, 1], [1, 2, 1, 0]):
        np.testing.assert_array_equal(scores.envelope_of_ends([runs[i] for i in order], 3), found)
    # From a start below the ends it is flat; runs that diverged leave it to the others.
    low = np.array([[[0.5, 2.0]]]), np.array([[[0.5, 2.0, 2.0, 1.0]]])
    np.testing.assert_array_equal(scores.envelope_of_ends(low, 1), [0.5] * 4)
    late = np.array([[[np.inf, 2.0]]]), np.array([[[0.5, np.nan, 2.0, 1.0]]])
    assert scores.envelope_of_ends(late, 1).tolist() == [0.5] * 4
    lost = np.full((2, 3, 4), np.nan)
    assert np.isposinf(scores.envelope_of_ends([lost], 1)).all()
    with pytest.raises(UserError, match="length of Adam's runs = 5"):
        scores.envelope_of_ends([np.ones((1, 1, 5))], 1)


def test_the_envelope_of_ends_is_smoothed_by_each_length():
    generator = np.random.default_rng(5)
    runs = [decaying(generator, n, 3) for n in (100, 400)]
    found = scores.envelope_of_ends(runs, 100)
    for run in runs:
        n = run.shape[-1]
        weights = (1 - 25 / n) ** np.arange(n - 1, -1, -1.0)
        ends = (run * weights).sum(-1) / weights.sum()
        np.testing.assert_allclose(found[n - 1], np.median(ends, axis=1).min(), rtol=1e-12)


@pytest.mark.parametrize("speed", [0.3, 0.5, 0.8, 1.0, 1.2, 1.6, 2.0, 3.0])
def test_under_a_decaying_rate_a_speedup_is_what_it_should_be(speed):
    """As fast as Adam with ``speed`` times the steps, in runs with noise of 1 % and other seeds."""
    for seed in range(3):
        other = decaying(np.random.default_rng([seed, 9]), 400, 9, speed, n_lr=1)
        values, capped = scores.speedup(scores.final_loss(other[0]), ends_of_adam(seed), 400)
        assert np.median(values) == pytest.approx(speed, rel=0.05) and not capped.any()


def test_under_a_decaying_rate_adams_median_seed_is_one():
    generator = np.random.default_rng(6)
    runs = [decaying(generator, n, 5) for n in scores.adam_steps("cosine", 400)]
    values, capped = scores.speedup(scores.final_loss(runs[0][0]), scores.envelope_of_ends(runs, 400), 400)
    assert np.median(values) == 1.0 and not capped.any()
    np.testing.assert_allclose(values, 1.0, atol=0.05)


@pytest.mark.parametrize("better", [0.95, 0.98, 0.995, 1.005, 1.02, 1.05])
def test_a_slightly_better_end_is_a_slight_speedup(better):
    """By the slope of Adam's ends, which without noise are known at every length."""
    ends = np.array([scores.final_loss(decaying(_Still, n, 1, n_lr=1))[0, 0] for n in range(200, 801)])
    final = better * ends[200]
    runs = [decaying(_Still, n, 1) for n in scores.adam_steps("cosine", 400)]
    [value], _ = scores.speedup(np.array([final]), scores.envelope_of_ends(runs, 400), 400)
    assert value == pytest.approx((200 + np.argmax(ends <= final)) / 400, rel=0.01)
    if better == 0.995:  # few lengths and the middles of their runs would give much more
        [wrong], _ = scores.speedup(
            np.array([final]), scores.envelope([runs[i] for i in (0, 5, 7)], 400), 400
        )
        assert value < 1.03 and wrong > 1.3


class _Still:
    """A generator of no noise."""

    @staticmethod
    def lognormal(mean, sigma, shape):
        return np.ones(shape)
