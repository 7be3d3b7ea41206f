"""Loss trackers: the loss buffer to the last bit, losses at the end of float32's range, NaN, infinity."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from celo_nnx.components.trackers import TRACKERS, LossBuffer, LossNormalizer
from celo_nnx.components.trackers.loss_buffer import _product
from celo_nnx.interfaces import Tracker
from celo_nnx.meta.truncation import NEVER

NAN, INF, LARGEST = float("nan"), float("inf"), float(np.finfo(np.float32).max)


def followed(part: Tracker, losses: object, num_steps: int = 100) -> tuple[np.ndarray, dict]:
    """Returns the readings ``[n, width]`` after each loss, and the states."""

    def step(state: dict, loss: jax.Array) -> tuple[dict, tuple]:
        state = part.update(state, loss)
        return state, (part.read(state, loss), state)

    run = jax.jit(lambda x: jax.lax.scan(step, part.init(num_steps), x)[1])
    readings, states = run(jnp.asarray(losses, jnp.float32))
    return np.asarray(readings), jax.tree.map(np.asarray, states)


def recipe(losses: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns features and averages by B1 to B8 with the roundings that OPTIMIZERS 14.2 states."""
    one, means, low = np.float32(1), np.zeros(10, np.float32), np.full(10, 999999999999.0, np.float32)
    features, averages = [], []
    for i, loss in enumerate(losses):
        fix = one - (d.astype(np.float64) ** (i + 1)).astype(np.float32)
        # Twice a loss may be beyond float32; as a limit that is as good as infinity.
        loss = np.float32(min(2.0 * abs(float((means / fix).max())), float(loss))) if i else loss
        means = (means.astype(np.float64) * d + np.float64(loss * (one - d))).astype(np.float32)
        mu = means / fix
        low = np.minimum(low, mu)
        ratio = (mu[:-1] - low[:-1]) / np.maximum(np.float32(1e-8), mu[1:] - low[:-1])
        features.append(np.clip(ratio - one, -1, 1) if i > 1 else np.zeros(9, np.float32))
        averages.append(means)
    return np.stack(features), np.stack(averages)


@pytest.mark.parametrize("num_steps", [1, 100, 50_000_000, NEVER])
@pytest.mark.parametrize("name", TRACKERS)
def test_readings_are_finite_whatever_the_length(name: str, num_steps: int) -> None:
    part = TRACKERS[name]()
    got, states = followed(part, [2.0, 1.5, 1.8, 1.2, 1.4, 1.3], num_steps)
    assert got.shape == (6, part.width) and np.isfinite(got).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states))


@pytest.mark.parametrize("num_steps", [20, 100_000, NEVER])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e34, 1e36, 1e38])
def test_loss_buffer_follows_the_recipe(scale: float, num_steps: int) -> None:
    """The averages to the bit over 300 losses, whatever their size: splits must not overflow."""
    rng = np.random.default_rng(0)
    losses = (2.3 * np.exp(-np.arange(300) / 150) + 0.1 * rng.normal(size=300)) * scale
    losses[100] *= 10  # a spike, which B3 cuts
    losses = np.minimum(losses, LARGEST).astype(np.float32)
    got, states = followed(LossBuffer(), losses, num_steps)
    features, means = recipe(losses, states["decays"][0])
    assert_array_equal(states["means"], means)
    assert_allclose(got, features, atol=1e-6)
    assert np.ptp(features) > 0.01


@pytest.mark.parametrize("compiled", [True, False])
def test_products_lose_nothing(compiled: bool) -> None:
    """A product and its rounding error add up to the exact product, fused with sums or not."""
    rng = np.random.default_rng(1)
    a = (rng.uniform(1, 2, size=50_000) * 2.0 ** rng.integers(-60, 127, size=50_000)).astype(np.float32)
    a = np.concatenate([a, -a, np.float32([3.4e38, 1e36, 1.0, 0.0])])
    b = rng.uniform(0.5, 1, size=a.size).astype(np.float32)
    multiply = jax.jit(_product) if compiled else _product
    product, lost = (np.asarray(x, np.float64) for x in multiply(jnp.asarray(a), jnp.asarray(b)))
    assert_array_equal(product + lost, a.astype(np.float64) * b)
    assert np.count_nonzero(lost) > 0.9 * a.size


@pytest.mark.parametrize("first", [1e34, 8.5e34, 1e36, 1e37, 3.4e38])
def test_a_huge_first_loss_leaves_finite_features(first: float) -> None:
    got, states = followed(LossBuffer(), [first, 1.0, 2.0, 0.5, 1.0])
    assert np.isfinite(got).all() and np.isfinite(states["means"]).all()
    assert np.ptp(got[2:]) > 1e-3  # the run's later losses still show


@pytest.mark.parametrize(
    ("bad", "at_first", "later"), [(NAN, True, True), (INF, True, False), (-INF, True, True)]
)
def test_a_loss_that_is_no_number_in_the_loss_buffer(bad: float, at_first: bool, later: bool) -> None:
    """As its docstring says: every later reading is NaN, but a late infinite loss is cut like a spike."""
    usual = [2.0, 1.5, 1.8, 1.2, 1.4, 1.3]
    got, _ = followed(LossBuffer(), [bad, *usual])
    assert np.isnan(got).all() == at_first
    got, _ = followed(LossBuffer(), [*usual[:3], bad, *usual[3:]])
    assert np.isfinite(got[:3]).all()
    if later:
        assert np.isnan(got[3:]).all()
    else:
        spike, _ = followed(LossBuffer(), [*usual[:3], 1e6, *usual[3:]])
        assert_array_equal(got, spike)
        assert np.isfinite(got).all()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [0, 3])
def test_a_loss_that_is_no_number_in_the_loss_normalizer(bad: float, place: int) -> None:
    losses = [2.0, 1.5, 1.8, 1.2, 1.4, 1.3]
    losses.insert(place, bad)
    got, _ = followed(LossNormalizer(), losses)
    assert np.isfinite(got[:place]).all() and np.isnan(got[place:]).all()


@pytest.mark.parametrize(("huge", "lost"), [(1.5e19, False), (2.5e19, True), (1e36, True)])
def test_a_huge_loss_silences_the_loss_normalizer(huge: float, lost: bool) -> None:
    """From about 2e19 the variance is infinite, so both numbers stay 0."""
    got, states = followed(LossNormalizer(), [2.0, 1.5, huge, 1.2, 1.4])
    assert np.isfinite(got).all()
    assert np.isinf(states["var"][2:]).all() == lost and (not got[2:].any()) == lost
