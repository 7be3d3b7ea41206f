"""What the twins share, against the micro test vectors of OPTIMIZERS section 14.5 and against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from celo_nnx.naive_zoo import trackers
from celo_nnx.naive_zoo.nn_adam import natural, stored
from celo_nnx.naive_zoo.recurrent import lstm, mix
from celo_nnx.naive_zoo.tensors import diagonal_features
from celo_nnx.naive_zoo.velo import row_statistics


def test_time_embeddings():
    at = [np.asarray(trackers.fraction_features(jnp.int32(t), jnp.int32(100))) for t in (0, 50)]
    assert_allclose(at[0][:5], [-0.2913126, -0.7615942, -0.9640276, -0.9993292, -0.9999876], atol=2e-7)
    want = [0.9998345, 0.9993292, 0.9950547, 0.7615942, -0.7615944, -0.9950547, -0.9993292, -0.9999092]
    assert_allclose(at[1], [*want, -0.9999876], atol=2e-7)
    assert_allclose(trackers.tanh_time(jnp.int32(3))[:3], np.tanh([2.0, 0.0, -0.7]), atol=2e-7)
    assert_allclose(trackers.sine_time(jnp.int32(3))[:2], np.sin([3 / np.pi, 1 / np.pi]), atol=2e-7)


def test_decays_of_the_loss_buffer():
    want = [0.9048374, 0.9254951, 0.9418131, 0.9546449, 0.9647]
    want += [0.972558, 0.9786861, 0.9834573, 0.9871675, 0.9900498]
    assert_allclose(trackers.loss_decays(100), want, atol=1.2e-7)
    # A known number and a traced one give the same bits: one compiler's folding is not the other's.
    known = jax.jit(lambda: trackers.loss_decays(20))()
    assert_array_equal(known, jax.jit(trackers.loss_decays)(jnp.int32(20)))
    assert_array_equal(known, trackers.loss_decays(20))


def _features(num_steps, losses):
    start = trackers.init_loss_buffer(num_steps)
    return np.asarray(jax.lax.scan(trackers.update_loss_buffer, start, jnp.asarray(losses, jnp.float32))[1])


def test_loss_buffer():
    got = _features(100, [2.0, 1.8, 1.9, 1.2, 9.0])
    assert not got[:2].any() and np.all(got[3] == -1.0)
    want = [-0.2712507, -0.2800987, -0.2871017, -0.2926778, -0.2962012, -0.2994221, -0.3049694]
    assert_allclose(got[2], [*want, -0.3035088, -0.3084502], atol=2e-6)
    want = [0.022233, 0.0172035, 0.0132985, 0.0102776, 0.0079406, 0.0061396, 0.0047504]
    assert_allclose(got[4], [*want, 0.0036701, 0.0028373], atol=2e-6)


@pytest.mark.parametrize("num_steps", [7, 20, 2000, 100_000, 2**31 - 1])
def test_loss_buffer_at_long_horizons(num_steps):
    """Follows the recipe of section 14.2, in which rounding is stated, to the last bits for 300 losses."""
    rng = np.random.default_rng(0)
    losses = (2.3 * np.exp(-np.arange(300) / 150) + 0.1 * rng.normal(size=300)).astype(np.float32)
    d, one = np.asarray(trackers.loss_decays(num_steps)), np.float32(1)
    means, low = np.zeros(10, np.float32), np.full(10, trackers.NEVER, np.float32)
    want = []
    for i, loss in enumerate(losses):
        correction = one - (d.astype(np.float64) ** (i + 1)).astype(np.float32)
        loss = min(2 * abs((means / correction).max()), loss) if i else loss
        exact = means.astype(np.float64) * d + np.float64(loss * (one - d))
        means = exact.astype(np.float32)
        mu = means / correction
        low = np.minimum(low, mu)
        ratio = (mu[:-1] - low[:-1]) / np.maximum(np.float32(1e-8), mu[1:] - low[:-1])
        want.append(np.clip(ratio - one, -1, 1) if i > 1 else np.zeros(9, np.float32))
    assert_allclose(_features(num_steps, losses), want, atol=1e-6)


def test_powers_are_rounded_once():
    d = np.concatenate([np.asarray(trackers.loss_decays(t)) for t in (100, 100_000)] + [[0.5, 0.9, 1.0]])
    d = d.astype(np.float32)
    exponents = [0, 1, 2, 3, 69, 299, 1000, 99_999]
    for n in exponents:
        want = (d.astype(np.float64) ** n).astype(np.float32)
        normal = want > np.finfo(np.float32).tiny
        assert_array_equal(np.asarray(trackers.power(d, n))[normal], want[normal], err_msg=str(n))


def test_loss_normalizer():
    """By hand, after one loss of 2; a spike is cut at 5 standard deviations."""
    d, loss = 0.9, np.float32(2.0)
    state = trackers.update_loss_normalizer(trackers.init_loss_normalizer(), loss, d)
    assert_allclose(state["mean"], 0.2, rtol=1e-6)
    assert_allclose(state["var"], 0.1 * 1.8**2, rtol=1e-6)  # around the new mean, not the old one
    assert_allclose(trackers.corrected_mean(state, d), 2.0, rtol=3e-6)
    assert_allclose(trackers.weigh_loss(state, np.float32(3.0), d), 1.0 / 1.8, rtol=1e-5)
    assert trackers.weigh_loss(state, np.float32(1e6), d) == 5.0
    assert trackers.corrected_mean(trackers.init_loss_normalizer(), d) == 0.0


def test_lstm_gates():
    """By hand, with one unit: input, candidate, forget, output; the forget gate is one more open."""
    weights = {
        "w": jnp.asarray([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]]),
        "b": jnp.asarray([0.0, 1, 0, 0]),
    }
    state = {"hidden": jnp.full((1, 1), 0.5), "cell": jnp.full((1, 1), 2.0)}
    got = lstm(weights, state, jnp.full((1, 1), 3.0))

    def sigma(x):
        return 1 / (1 + np.exp(-x))

    cell = sigma(1.25 + 1.0) * 2.0 + sigma(0.55) * np.tanh(0.9 + 1.0)
    assert_allclose(got["cell"], [[cell]], rtol=1e-6)
    assert_allclose(got["hidden"], [[sigma(1.6) * np.tanh(cell)]], rtol=1e-6)


def test_mixing_adds_the_largest_row():
    x = jnp.asarray([[1.0, -2.0], [3.0, 0.5]])
    eye, zero = jnp.eye(2), jnp.zeros(2)
    weights = {"max": {"w": eye, "b": zero}, "skip": {"w": 2 * eye, "b": zero + 1}}
    assert_allclose(mix(weights, x), [[6.0, -2.5], [10.0, 2.5]])


def test_unfactored_momentum_is_finite_at_zero_gradient():
    v = {"diagonal": jnp.full((2, 1), 1e-33)}
    got = diagonal_features(jnp.zeros((2, 1)), v, 0.0)
    assert not np.any(np.asarray(got["factored_momentum"]))
    assert_array_equal(got["row"], got["column"])
    assert_array_equal(got["rsqrt_row"], got["rsqrt_column"])
    got = diagonal_features(jnp.ones((2, 1)), {"diagonal": jnp.full((2, 1), 3e-6)}, 1e-6)
    assert_allclose(got["factored_momentum"], 500.0, rtol=1e-6)


def test_numbers_of_nn_adam():
    for name, value, want in (("lr", 1e-4, -0.92103404), ("b1", 0.9, -0.2302585), ("b2", 0.999, -0.6907768)):
        y = stored(name, jnp.float32(value))
        assert_allclose(y, want, atol=5e-6)
        assert_allclose(natural(name, y), value, rtol=1e-5)
    assert_allclose(stored("eps", jnp.float32(1e-8)), -1.8420681, rtol=1e-6)
    limits = {"lr": (1e-8, 1e3), "b1": (0.0, 1 - np.exp(-10.0)), "eps": (1e-11, 1e4)}
    for name, (low, high) in limits.items():
        got = sorted(float(natural(name, jnp.float32(y))) for y in (-100.0, 100.0))
        assert_allclose(got, [low, high], rtol=1e-6, err_msg=name)


def test_rows_of_velo():
    """By hand: the second moment varies around the momentum's mean, and is scaled once."""
    p, m = jnp.asarray([[2.0, 2.0]]), jnp.asarray([[[1.0], [3.0]]])
    rms = jnp.asarray([[[4.0], [6.0]]])
    mean_rms, rank, var_m, var_rms = row_statistics(p, m, rms)
    assert_allclose(mean_rms, 0.5 * np.log([25.0]), rtol=1e-6)  # (2 + 3) / 2, times ten
    assert_array_equal(rank, [0, 1, 0, 0, 0])  # one axis is longer than 1
    assert_allclose(var_m, 0.5 * np.log([2.5]), rtol=1e-6)
    assert_allclose(var_rms, 0.5 * np.log([10 * (1.0 + 4.0) / 2]), rtol=1e-6)  # 2 and 3 around 1
    zeros = row_statistics(jnp.asarray(5.0), jnp.zeros((1, 1)), jnp.zeros((1, 1)))
    assert zeros[0] == -2.5 and zeros[2] == -2.5
    assert_array_equal(zeros[1], [1, 0, 0, 0, 0])
