"""Aggregates against scipy, enumerated bootstrap distributions and, where it is installed, rliable."""

import itertools

import numpy as np
import pytest
from scipy import stats

from celo_nnx.errors import UserError
from celo_nnx.evaluation import aggregates, scores
from celo_nnx.evaluation.aggregates import aggregate, difference, improvement, profile


def some(seeds=5, tasks=17, seed=0):
    """Scores with diverged runs among them."""
    scores = np.random.default_rng(seed).lognormal(0.1, 0.4, (seeds, tasks))
    scores[0, :2] = 0.0
    return scores


def test_statistics_by_hand():
    for seeds, tasks in [(1, 1), (3, 1), (1, 7), (5, 17), (4, 4)]:
        x = some(max(seeds, 1), tasks)[:seeds, :tasks]
        middle = sorted(x.ravel())[x.size // 4 : x.size - x.size // 4]
        assert aggregate(x).value == pytest.approx(sum(middle) / len(middle), abs=1e-12)
        assert aggregate(x, "mean").value == pytest.approx(x.mean(), abs=1e-12)
        assert aggregate(x, "median").value == pytest.approx(np.median(x.mean(axis=0)), abs=1e-12)


@pytest.mark.parametrize("statistic", ["iqm", "mean", "median"])
def test_intervals_agree_with_scipys_bootstrap(statistic):
    x = some()

    def function(*columns, axis=-1):
        stacked = np.stack(columns, axis=-1)  # [..., n_seeds, n_tasks]
        return {
            "iqm": lambda: stats.trim_mean(np.concatenate(columns, axis=axis), 0.25, axis=axis),
            "mean": lambda: stacked.mean(axis=(-2, -1)),
            "median": lambda: np.median(stacked.mean(axis=-2), axis=-1),
        }[statistic]()

    options = dict(n_resamples=20_000, method="percentile", vectorized=True, rng=1)
    theirs = stats.bootstrap(tuple(x.T), function, **options).confidence_interval
    ours = aggregate(x, statistic, resamples=20_000, seed=2)
    width = theirs.high - theirs.low
    assert 0 < width and ours.low < ours.value < ours.high
    assert ours.low == pytest.approx(theirs.low, abs=0.05 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.05 * width)


def test_the_bootstrap_is_stratified():
    # Every sample of two seeds by task, enumerated; tasks of very different levels are never mixed.
    x = np.array([[1.0, 100.0], [3.0, 500.0]])
    means = [
        (x[list(a), 0].mean() + x[list(b), 1].mean()) / 2
        for a, b in itertools.product(itertools.product((0, 1), repeat=2), repeat=2)
    ]
    found = aggregates.mean(aggregates._resampled(x, 20_000, seed=0))
    for value in set(means):
        assert np.mean(found == value) == pytest.approx(np.mean(np.array(means) == value), abs=0.015)
    assert set(np.unique(found)) == set(means)


def test_profile_by_hand_and_its_intervals():
    x, thresholds = some(), np.linspace(0, 3, 13)
    found = profile(x, thresholds, resamples=4000)
    np.testing.assert_allclose(found.value, [np.mean(x > t) for t in thresholds], atol=1e-12)
    assert (np.diff(found.value) <= 0).all() and found.value[0] == 1 - 2 / x.size
    assert (found.low <= found.value).all() and (found.value <= found.high).all()
    above = x > thresholds[5]
    # The part above a threshold is a sum of independent binomials; the normal interval is close.
    spread = np.sqrt((above.mean(0) * (1 - above.mean(0))).sum() * len(x)) / x.size
    assert found.high[5] - found.low[5] == pytest.approx(2 * 1.96 * spread, rel=0.15)


def test_improvement_is_mann_and_whitneys():
    x, y = np.round(some(5, seed=3), 1), np.round(some(4, seed=4), 1)  # rounded: ties
    u = [stats.mannwhitneyu(x[:, t], y[:, t]).statistic / 20 for t in range(x.shape[1])]
    found = improvement(x, y)
    assert found.value == pytest.approx(np.mean(u), abs=1e-12)
    assert found.low < found.value < found.high
    assert improvement(y, x).value == pytest.approx(1 - found.value, abs=1e-12)
    assert improvement(x, x).value == pytest.approx(0.5, abs=1e-12)
    assert improvement(x + 100, x) == aggregates.Estimate(1.0, 1.0, 1.0)


def test_improvements_interval_agrees_with_plain_resampling():
    x, y = some(6, 8, seed=5), some(4, 8, seed=6) * 1.1
    samples = []
    a, b = aggregates._resampled(x, 4000, seed=7), aggregates._resampled(y, 4000, seed=8)
    for p, q in zip(a, b, strict=True):
        samples.append(((p[:, None] > q[None]) + 0.5 * (p[:, None] == q[None])).mean())
    low, high = np.percentile(samples, [2.5, 97.5])
    found = improvement(x, y, resamples=20_000)
    assert found.low == pytest.approx(low, abs=0.015) and found.high == pytest.approx(high, abs=0.015)


def test_order_of_seeds_and_tasks_does_not_matter():
    x, y = some(), some(seed=9)
    generator = np.random.default_rng(0)
    seeds, tasks = generator.permutation(5), generator.permutation(17)
    for statistic in aggregates.STATISTICS:
        mixed = aggregate(x[seeds][:, tasks], statistic, resamples=20_000)
        plain = aggregate(x, statistic, resamples=20_000)
        assert mixed.value == pytest.approx(plain.value, abs=1e-12)
        assert mixed.low == pytest.approx(plain.low, abs=0.01)
        assert mixed.high == pytest.approx(plain.high, abs=0.01)
    assert improvement(x[seeds][:, tasks], y[:, tasks]).value == pytest.approx(
        improvement(x, y).value, abs=1e-12
    )


def test_same_seed_same_interval():
    assert aggregate(some(), seed=3) == aggregate(some(), seed=3)
    assert aggregate(some(), seed=3) != aggregate(some(), seed=4)
    assert improvement(some(), some(seed=1)) == improvement(some(), some(seed=1))


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_have_no_interval_and_say_so(seeds):
    x, y = some(seeds), some(3)
    alone = (aggregate(x), profile(x, np.arange(3.0)))
    for found in (
        *alone,
        *(f(*pair) for f in (improvement, difference) for pair in ((x, y), (y, x), (x, x))),
    ):
        assert found.low is None and found.high is None and "at least 3 seeds" in found.note
    assert aggregate(y).low is not None and difference(y, y).low is not None


@pytest.mark.parametrize("statistic", ["iqm", "mean", "median"])
def test_difference_pairs_the_seeds(statistic):
    x, noise = some(3), np.random.default_rng(1).normal(0, 0.01, (3, 17))
    y = x + noise
    found = difference(x, y, statistic)
    function = aggregates.STATISTICS[statistic]
    assert found.value == pytest.approx(function(x) - function(y), abs=1e-12)
    assert difference(x, x, statistic) == aggregates.Estimate(0.0, 0.0, 0.0)
    # Apart, both vary by their seeds, 0.4; together, by the noise alone.
    apart = difference(np.vstack([x, x[:1]]), y, statistic)
    assert found.high - found.low < 0.2 * (apart.high - apart.low)
    if statistic == "mean":  # then the difference is the aggregate of differences
        alone = aggregate(x - y, "mean")
        assert (found.low, found.high) == pytest.approx((alone.low, alone.high), abs=1e-12)


def test_difference_of_independent_seeds_has_both_variances():
    x, y = some(5, 17, seed=3), some(4, 17, seed=4)
    spread = np.sqrt(sum((z.var(axis=0) / len(z)).sum() for z in (x, y))) / 17
    found = difference(x, y, "mean", resamples=20_000)
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.05)


def test_an_optimizer_equal_to_adam_is_seldom_told_from_it():
    """Against the envelope of the same runs, speedups are below 1 far more often than below Adam's own."""
    generator, steps, tasks, seeds = np.random.default_rng(0), 50, 17, 3
    curve = (np.arange(1, 4 * steps + 1) + 5.0) ** -0.5 + 0.1
    below, apart, repetitions = 0, 0, 100

    def runs(length):
        level = generator.lognormal(0, 0.03, (tasks, seeds, 1))
        return curve[:length] * level * generator.lognormal(0, 0.05, (tasks, seeds, length))

    for _ in range(repetitions):
        adam, other = runs(4 * steps), runs(steps)
        found = []
        for x in (other, adam[..., :steps]):
            ends = scores.final_loss(x)
            pairs = zip(ends, adam, strict=True)
            found.append([scores.speedup(e, scores.envelope([a[None]], steps), steps)[0] for e, a in pairs])
        other, own = (np.array(x).T for x in found)
        below += aggregate(other, resamples=200).high < 1
        faster = difference(other, own, resamples=200)
        apart += not faster.low <= 0 <= faster.high
    assert apart <= 0.22 * repetitions and apart < below


def test_all_diverged():
    lost = np.zeros((3, 17))
    for statistic in aggregates.STATISTICS:
        assert aggregate(lost, statistic) == aggregates.Estimate(0.0, 0.0, 0.0)
    assert improvement(lost, lost).value == 0.5 and improvement(lost, some(3) + 0.1).value == 0.0
    assert profile(lost, np.array([0.0])).value.tolist() == [0.0]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: aggregate(some(), "iqmm"), "did you mean 'iqm'"),
        (lambda: aggregate(np.ones(3)), "n_seeds, n_tasks"),
        (lambda: aggregate(np.array([[np.nan]])), "finite"),
        (lambda: aggregate(some(), confidence=95), "confidence = 95"),
        (lambda: improvement(some(), some(tasks=3)), "number of tasks"),
        (lambda: difference(some(), some(tasks=3)), "number of tasks"),
        (lambda: difference(some(), some(), "iqmm"), "did you mean 'iqm'"),
    ],
)
def test_mistakes_are_told_in_one_line(call, words):
    with pytest.raises(UserError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_rliable_agrees():
    try:
        from rliable import library, metrics
    except Exception as error:  # it is never a dependency, and some versions fail on import
        pytest.skip(f"rliable cannot be imported: {error}")
    x, y = some(), some(seed=1)
    np.random.seed(0)  # it ignores its own random state
    theirs, interval = library.get_interval_estimates(
        {"x": x}, lambda s: np.array([metrics.aggregate_iqm(s), metrics.aggregate_median(s)]), reps=5000
    )
    for i, statistic in enumerate(("iqm", "median")):
        ours = aggregate(x, statistic, resamples=20_000)
        assert ours.value == pytest.approx(theirs["x"][i], abs=1e-6)
        low, high = interval["x"][:, i]
        assert ours.low == pytest.approx(low, abs=0.05 * (high - low))
        assert ours.high == pytest.approx(high, abs=0.05 * (high - low))
    assert improvement(x, y).value == pytest.approx(metrics.probability_of_improvement(x, y), abs=1e-6)
