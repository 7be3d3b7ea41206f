"""Lengths of trajectories."""

import jax
import numpy as np
import pytest

from celo_nnx.errors import UserError
from celo_nnx.meta.truncation import TRUNCATIONS, Constant, LogUniform


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


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("log_uniform", {"minimum": 0}, r"minimum = 0 .* >= 1"),
        ("log_uniform", {"minimum": 50, "maximum": 49}, r"maximum = 49 .* >= unroll.minimum = 50"),
        ("log_uniform", {"minimum": 1.5}, r"minimum = 1.5"),
        ("constant", {"length": True}, r"length = True"),
    ],
)
def test_ranges_are_checked(kind, arguments, message):
    with pytest.raises(UserError, match=message):
        TRUNCATIONS[kind](**arguments)
