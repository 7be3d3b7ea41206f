"""Lengths of trajectories."""

import jax
import numpy as np
import pytest

from celo_nnx.errors import UserError
from celo_nnx.meta.truncation import NEVER, TRUNCATIONS, Constant, Growing, LogUniform, NeverEnding


def test_log_uniform_lengths_are_bounded_and_uniform_in_the_logarithm():
    draw = jax.jit(jax.vmap(LogUniform(minimum=100, maximum=2000)))
    lengths = np.asarray(draw(jax.random.split(jax.random.key(0), 20000)))
    assert lengths.dtype == np.int32
    assert 100 <= lengths.min() < 103 and 1950 < lengths.max() <= 2000
    fraction = np.log(lengths / 100) / np.log(20)
    shares = np.histogram(fraction, bins=10, range=(0, 1))[0] / lengths.size
    np.testing.assert_allclose(shares, 0.1, atol=0.01)


def test_short_lengths_all_occur():
    draw = jax.vmap(LogUniform(minimum=1, maximum=4))
    assert set(np.asarray(draw(jax.random.split(jax.random.key(1), 500))).tolist()) >= {1, 2, 3}


def test_constant():
    assert int(Constant(length=7)(jax.random.key(0))) == 7 == Constant(length=7).maximum


def test_growing_lengths_are_bounded_by_a_bound_that_grows_geometrically():
    schedule = Growing(minimum=3, start=10, maximum=1000, iterations=200)
    bounds = [int(schedule.bound(i)) for i in (0, 50, 100, 150, 200, 10**6)]
    assert bounds == [10, 32, 100, 316, 1000, 1000]
    draw = jax.jit(jax.vmap(schedule, (0, None)))
    keys = jax.random.split(jax.random.key(2), 4000)
    for iteration, bound in ((0, 10), (100, 100), (300, 1000)):
        lengths = np.asarray(draw(keys, iteration))
        assert lengths.min() == 3 and 0.9 * bound <= lengths.max() <= bound
        np.testing.assert_allclose(np.mean(lengths < (3 * bound) ** 0.5), 0.5, atol=0.15)
    # Where nothing grows, it is the log-uniform schedule.
    still = Growing(minimum=3, start=50, maximum=50, iterations=1)
    np.testing.assert_array_equal(
        jax.vmap(still)(keys[:99]), jax.vmap(LogUniform(minimum=3, maximum=50))(keys[:99])
    )


def test_never():
    assert int(NeverEnding()(jax.random.key(0), 5)) == NEVER == NeverEnding().maximum == 2**31 - 1


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("log_uniform", {"minimum": 0}, r"minimum = 0 .* >= 1"),
        ("log_uniform", {"minimum": 50, "maximum": 49}, r"maximum = 49 .* >= unroll.minimum = 50"),
        ("log_uniform", {"minimum": 1.5}, r"minimum = 1.5"),
        ("constant", {"length": True}, r"length = True"),
        ("growing", {"minimum": 10, "start": 9}, r"start = 9 .* >= unroll.minimum = 10"),
        ("growing", {"start": 10, "maximum": 9}, r"maximum = 9 .* >= unroll.start = 10"),
        ("growing", {"iterations": 0}, r"iterations = 0 .* >= 1"),
    ],
)
def test_ranges_are_checked(kind, arguments, message):
    with pytest.raises(UserError, match=message):
        TRUNCATIONS[kind](**arguments)
