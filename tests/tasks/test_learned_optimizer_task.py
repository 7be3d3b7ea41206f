"""Training a learned optimizer as a task: its value, and its gradient against the exact one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from celo_nnx.errors import UserError
from celo_nnx.tasks.analytic import Quadratic
from celo_nnx.tasks.learned_optimizer import DECAYS, EXPONENT, LearnedOptimizerTask

INNER = Quadratic(eigenvalues=(2.0, 0.5), rotated=False)
KEY = jax.random.key(0)


def made(**settings: object) -> tuple[LearnedOptimizerTask, dict, dict]:
    task = LearnedOptimizerTask(inner=INNER, **settings)
    nothing = {"none": jnp.zeros(1)}
    return task, task.init(KEY)[0], task.draw(nothing, KEY, jnp.int32(0), jnp.int32(1))


def test_the_unroll_by_hand() -> None:
    task, theta, batch = made(hidden=(), unroll=3, step=0.1)
    got = task.evaluate(theta, {}, KEY, batch)
    w, b = (np.asarray(theta["linear_0"][name], np.float64) for name in "wb")
    init_key = jax.random.split(jax.random.split(KEY)[1], 3)[1]
    x = np.asarray(INNER.init(init_key)[0]["x"], np.float64)
    averages, losses = np.zeros((3, 2, 1)), []
    for _ in range(3):
        grad = np.array([[2.0], [0.5]]) * x
        averages = np.array([d * m + (1 - d) * grad for d, m in zip(DECAYS, averages, strict=True)])
        planes = np.stack([grad, x, *averages])
        planes = planes / np.sqrt((planes**2).mean((1, 2), keepdims=True) + 1e-10)
        d, m = np.moveaxis(np.moveaxis(planes, 0, -1) @ w + b, -1, 0)
        x = x - 0.1 * d * np.exp(EXPONENT * m)
        losses.append(np.log1p(x[0, 0] ** 2 + 0.25 * x[1, 0] ** 2))
    assert got == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_gradient_is_that_of_the_unroll() -> None:
    """With many small perturbations the estimate is the gradient through the unroll."""
    task, theta, batch = made(hidden=(), unroll=4, pairs=4000, std=0.01, step=0.1)

    @jax.jit
    def both(theta: dict) -> tuple:
        loss = jax.value_and_grad(lambda t: task.loss(t, {}, KEY, batch)[0])(theta)
        return loss, jax.value_and_grad(lambda t: task.evaluate(t, {}, KEY, batch))(theta)

    (value, estimate), (exact_value, exact) = both(theta)
    assert float(value) == pytest.approx(float(exact_value), rel=1e-3)
    estimate, exact = (np.concatenate([x.ravel() for x in jax.tree.leaves(g)]) for g in (estimate, exact))
    # The estimate's error has about |exact| sqrt(12 parameters / 4000 pairs), 5 %.
    assert np.linalg.norm(estimate - exact) < 0.15 * np.linalg.norm(exact) and np.linalg.norm(exact) > 1e-3


def test_the_value_is_the_mean_over_the_pairs() -> None:
    task, theta, batch = made(hidden=(3,), unroll=2, pairs=3, std=0.5)
    value, state, aux = task.loss(theta, {}, KEY, batch)
    noise_key, inner_key = jax.random.split(KEY)
    losses = []
    leaves, tree = jax.tree.flatten(theta)
    noises = [
        0.5 * jax.random.normal(jax.random.fold_in(noise_key, i), (3, *x.shape)) for i, x in enumerate(leaves)
    ]
    for pair in range(3):
        for sign in (1, -1):
            moved = jax.tree.unflatten(
                tree, [x + sign * v[pair] for x, v in zip(leaves, noises, strict=True)]
            )
            losses.append(task.unrolled(moved, inner_key, batch))
    assert value == pytest.approx(np.mean(losses), rel=1e-5) and state == {} and aux == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inner": "digits"}, "inner = 'digits' .*a task"),
        ({"pairs": 0}, "pairs = 0 .*>= 1"),
        ({"unroll": 0}, "unroll = 0 .*>= 1"),
        ({"std": 0.0}, "std = 0.0 .*> 0"),
        ({"hidden": (0,)}, r"hidden = \(0,\)"),
    ],
)
def test_values_out_of_range(change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        LearnedOptimizerTask(**({"inner": INNER} | change))
