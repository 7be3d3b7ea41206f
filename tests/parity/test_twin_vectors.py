"""The plain twin against the micro test vectors of OPTIMIZERS section 14.5."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose

from celo_nnx.naive import NaiveCelo2, newton_schulz
from celo_nnx.naive_zoo.tensors import accumulate_factored, factored_statistics

COEFFS = (3.4445, -4.7750, 2.0315)


def test_factored_first_step():
    g = jnp.asarray([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    zero = {"row": jnp.zeros((2, 1)), "column": jnp.zeros((3, 1))}
    v = accumulate_factored(zero, g, (0.9,), (0, 1))
    assert_allclose(v["row"][:, 0], [0.4666668, 2.5666673], rtol=2e-7)
    assert_allclose(v["column"][:, 0], [0.8500002, 1.4500003, 2.2500005], rtol=2e-7)
    row, column = factored_statistics(v, (0, 1))
    want = [[1.9553845, 2.9942470, 3.6055508], [3.3351152, 3.1918781, 3.0748241]]
    assert_allclose(g * row[..., 0] * column[..., 0], want, rtol=3e-7)


def test_unfactored_first_step():
    v = accumulate_factored({"diagonal": jnp.zeros((2, 1))}, jnp.asarray([1.0, -2.0]), (0.9,), None)
    assert_allclose(v["diagonal"][:, 0], [0.1, 0.4], rtol=3e-7)


def test_newton_schulz():
    x = jnp.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    want = [[-0.4675182, 0.5734730], [0.0724324, 0.4094524], [0.6123831, 0.2454318]]
    assert_allclose(newton_schulz(x, COEFFS, 5, 1e-8), want, atol=2e-6)
    batch = jnp.stack([x, 2.0 * x, x[::-1]])
    assert_allclose(newton_schulz(batch, COEFFS, 5, 1e-8)[1], want, atol=2e-6)


def test_adam_first_step():
    rule = NaiveCelo2(None, learning_rate=1.0, adam_multiplier=1.0, route=lambda path, shape: "adam")
    params = {"b": jnp.zeros((1,))}
    updates, _ = rule.update({"b": jnp.full((1,), 0.2)}, rule.init(params, 1), params, value=jnp.zeros(()))
    assert_allclose(-np.asarray(updates["b"]), [0.4472125], rtol=2e-7)
