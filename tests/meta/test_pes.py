"""The PES estimate: against recorded numbers, against the analytic gradient, and against plain ES."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from celo_nnx.errors import UserError
from celo_nnx.meta.estimators.pes import PES, pes_gradient
from celo_nnx.meta.truncation import Constant, LogUniform


def test_published_estimate_equals_the_recorded_one(shared):
    path = shared / "golden" / "pes_grad.npz"
    tolerance = json.loads(path.with_suffix(".json").read_text())["tolerance"]["abs"]
    with np.load(path, allow_pickle=False) as file:
        data = {name: file[name] for name in file}

    def tree(prefix):
        return {name: data[f"{prefix}/{name}"] for name in ("w", "b", "s")}

    gradient, accumulator, loss = pes_gradient(
        *(data[name] for name in ("pos_loss", "neg_loss", "is_done", "mask")),
        tree("vec_pos"),
        tree("accumulator"),
        data["std"],
        "published",
    )
    for got, want in ((gradient, tree("grad")), (accumulator, tree("new_accumulator"))):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), got, want)
    np.testing.assert_allclose(loss, data["mean_loss"], atol=tolerance)


def test_exact_credits_the_last_loss_to_the_finished_trajectory():
    # Columns: ends with step 1 of 4 (step 2 resets); never ends; ends with the last step.
    delta = np.array([[1, 1, 1], [10, 1, 1], [0, 1, 1], [1000, 1, 5]], np.float32)
    mask = np.ones((4, 3), bool)
    mask[2, 0] = False
    done = np.zeros((4, 3), bool)
    done[1, 0] = done[3, 2] = True
    v, xi = np.array([1, 2, 3], np.float32), np.array([100, 200, 300], np.float32)
    gradient, carried, _ = pes_gradient(delta, np.zeros_like(delta), done, mask, v, xi, 0.5, "exact")
    factor = 1 / (2 * 0.25)
    parts = [(11 * 101 + 1000 * 1) / 3, 4 * 202 / 4, 8 * 303 / 4]
    np.testing.assert_allclose(gradient, factor * np.mean(parts), rtol=1e-6)
    np.testing.assert_array_equal(carried, [1, 202, 0])
    gradient, carried, _ = pes_gradient(delta, np.zeros_like(delta), done, mask, v, xi, 0.5, "published")
    parts = [(1 * 101 + 1010 * 1) / 3, 4 * 202 / 4, (3 * 303 + 5 * 3) / 4]
    np.testing.assert_allclose(gradient, factor * np.mean(parts), rtol=1e-6)
    np.testing.assert_array_equal(carried, [1, 202, 3])


def estimate(toy, estimator, theta, start=0, key=1):
    """The first meta-iteration: first state, gradient, next state, metrics."""

    @toy.jit
    def run(start, key):
        first = estimator.init(theta, start)
        return first, *estimator(theta, first, key)

    return run(jax.random.key(start), jax.random.key(key))


def analytic(offsets, length, steps, truncations, drift, rate=0.1, start=1.0, target=-0.5):
    """Gradients [truncations] of the mean loss of a truncation, averaged over pairs, by recursion."""
    step, w = offsets.copy(), np.full(offsets.shape, start)
    slope, done = np.zeros(offsets.shape), np.zeros(offsets.shape, bool)
    result = []
    for _ in range(truncations):
        total, counted = np.zeros(offsets.shape), np.zeros(offsets.shape)
        for _ in range(steps):
            total += np.where(done, 0.0, (w - target) * slope)
            counted += ~done
            new_w = np.where(done, start, w - rate * (w - target) + rate * drift)
            slope = np.where(done, 0.0, (1 - rate) * slope + rate)
            step = np.where(done, 0, step + 1)
            w, done = new_w, step >= length
        result.append(np.mean(total / counted))
    return np.array(result)


def many_estimates(toy, finished_step, length=7, steps=4, truncations=9, pairs=64, repeats=512):
    """Estimates [repeats, truncations] from independent keys, and the gradients for their starts."""
    theta = {"drift": jnp.float32(0.7)}
    options = {"pairs": pairs, "std": 0.1, "truncation": steps, "finished_step": finished_step}
    estimator = PES(toy.Drift(), [toy.family()], unroll=Constant(length=length), **options)

    @toy.jit
    @jax.vmap
    def repeat(key):
        state = estimator.init(theta, jax.random.fold_in(key, 99))
        offsets = state[0].problems.inner_step

        def one(state, k):
            gradient, state, _ = estimator(theta, state, jax.random.fold_in(key, k))
            return state, gradient["drift"]

        return jax.lax.scan(one, state, jnp.arange(truncations))[1], offsets

    estimates, offsets = jax.tree.map(np.asarray, repeat(jax.random.split(jax.random.key(11), repeats)))
    assert offsets.min() == 0 and offsets.max() == length - 1
    return estimates, np.stack([analytic(o, length, steps, truncations, 0.7) for o in offsets.astype(int)])


def test_exact_is_unbiased_over_truncations_with_resets(toy):
    estimates, truth = many_estimates(toy, "exact")
    error = estimates - truth
    mean, standard_error = error.mean(0), error.std(0) / np.sqrt(len(error))
    assert np.all(np.abs(mean) < 4 * standard_error), (mean, standard_error)
    total = error.sum(1)
    standard_error = total.std() / np.sqrt(len(total))
    assert abs(total.mean()) < 3 * standard_error
    # The test could see a bias of two per cent.
    assert standard_error < 0.02 / 3 * truth.sum(1).mean()


def test_published_is_biased(toy):
    estimates, truth = many_estimates(toy, "published")
    total = (estimates - truth).sum(1)
    assert abs(total.mean()) > 6 * total.std() / np.sqrt(len(total))


def test_one_truncation_without_reset_is_es_on_the_mean_loss(toy):
    pairs, steps, std = 6, 10, 0.3
    theta = {"drift": jnp.float32(-0.4)}
    task = toy.Quadratic(noise=0.5)
    estimator = PES(
        toy.Drift(),
        [toy.family(task=task)],
        pairs=pairs,
        std=std,
        truncation=steps,
        unroll=Constant(length=500),
    )
    first, gradient, state, metrics = estimate(toy, estimator, theta, key=5)
    assert np.all(np.asarray(first[0].problems.inner_step) < 480)
    # The accumulator holds the perturbations; batches are drawn again from the same keys.
    v = np.asarray(state[0].accumulator[:, 0])
    x = batches(estimator, jax.random.key(5), steps)

    def mean_loss(drift, x):
        w, losses = 1.0, []
        for t in range(steps):
            losses.append(0.5 * (w + 0.5) ** 2 + 0.5 * x[t] * w)
            w = w - 0.1 * (w + 0.5 + 0.5 * x[t]) + 0.1 * drift
        return np.mean(losses)

    pos = np.array([mean_loss(-0.4 + v[n], x[n]) for n in range(pairs)])
    neg = np.array([mean_loss(-0.4 - v[n], x[n]) for n in range(pairs)])
    np.testing.assert_allclose(gradient["drift"], np.mean((pos - neg) * v / (2 * std**2)), rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], np.mean((pos + neg) / 2), rtol=1e-5)


def batches(estimator, key, steps):
    """The numbers x that each pair draws, [pairs, steps], by the documented derivation of keys."""
    group, data = estimator.population.groups[0], estimator.data[0]["train"]

    def one(number):
        unroll_key = jax.random.split(jax.random.fold_in(key, number))[1]
        draw_key = jax.random.split(unroll_key, 3)[0]

        def draw(t):
            key = jax.random.fold_in(draw_key, t)
            return group.task.draw(data, key, group.start["train"][0], group.count["train"][0])["x"]

        return jax.vmap(draw)(jnp.arange(steps))

    return np.asarray(jax.jit(jax.vmap(one))(jnp.arange(estimator.pairs)))


def test_families_count_equally_and_see_their_own_data(toy):
    # Families of one task share a batch; their data and their metrics stay apart.
    noisy = toy.Quadratic(noise=1.0)
    apart = [toy.family("low", noisy, -3.0, -2.0), toy.family("other"), toy.family("high", noisy, 2.0, 3.0)]
    options = {"pairs": 16, "std": 0.1, "truncation": 5, "unroll": Constant(length=100)}
    estimator = PES(toy.Drift(), apart, **options)
    assert [group.members for group in estimator.population.groups] == [(0, 2), (1,)]
    theta = {"drift": jnp.float32(0.0)}
    _, _, _, metrics = estimate(toy, estimator, theta)
    low, other, high = np.asarray(metrics["family_loss"])
    assert low < other < high
    np.testing.assert_allclose(metrics["loss"], (low + other + high) / 3, rtol=1e-6)


def test_nonfinite_losses_are_counted_and_the_gradient_stays_finite(toy):
    bad = toy.Quadratic(bad_above=0.5)
    families = [toy.family("good"), toy.family("bad", bad)]
    estimator = PES(toy.Drift(), families, pairs=8, std=0.1, truncation=20, unroll=LogUniform())
    theta = {"drift": jnp.float32(0.0)}
    _, gradient, _, metrics = estimate(toy, estimator, theta)
    good, count = np.asarray(metrics["nonfinite"])
    assert good == 0 and 20 < count <= 8 * 2 * 20
    assert np.isfinite(metrics["loss"]) and np.isfinite(gradient["drift"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 0}, "pairs = 0 .* >= 1"),
        ({"std": 0.0}, "std = 0.0 .* > 0"),
        ({"std": float("nan")}, "std = nan"),
        ({"truncation": 2.5}, "truncation = 2.5"),
        ({"finished_step": "exakt"}, "did you mean 'exact'"),
        ({"devices": 1000}, "devices = 1000 .* at most"),
    ],
)
def test_ranges_are_checked(toy, options, message):
    with pytest.raises(UserError, match=message):
        PES(toy.Drift(), [toy.family()], **options)


def test_families_are_needed_and_must_fit(toy):
    with pytest.raises(UserError, match="at least 1"):
        PES(toy.Drift(), [])
    odd = toy.family("odd")
    odd.train["x"] = odd.train["x"].astype(np.float64)
    with pytest.raises(UserError, match="'odd' do not fit those of 'a'"):
        PES(toy.Drift(), [toy.family(), odd])
