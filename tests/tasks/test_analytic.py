"""Problems with formulas: values, minima, spectra, noise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from celo_nnx.errors import UserError
from celo_nnx.tasks.analytic import FORMULAS, Analytic, Quadratic

KEY = jax.random.key(0)


def value(task: Analytic, x: np.ndarray) -> float:
    return float(task.loss({"x": jnp.asarray(x, jnp.float32)}, {}, KEY, {})[0])


def test_formulas_by_hand() -> None:
    x = np.random.default_rng(0).uniform(-2, 2, 5)
    by_hand = {
        "rosenbrock": optimize.rosen(x),
        "rastrigin": 50 + sum(a * a - 10 * np.cos(2 * np.pi * a) for a in x),
        "styblinski_tang": sum(a**4 - 16 * a**2 + 5 * a for a in x) / 2,
    }
    for name in FORMULAS:
        assert value(Analytic(formula=name, dimension=5), x) == pytest.approx(by_hand[name], rel=1e-5)


@pytest.mark.parametrize("name", FORMULAS)
def test_the_floor_is_the_minimum(name: str) -> None:
    task = Analytic(formula=name, dimension=2)
    best = {"rosenbrock": 1.0, "rastrigin": 0.0, "styblinski_tang": -2.903534}[name]
    assert value(task, np.full(2, best)) == pytest.approx(task.floor, abs=1e-4)
    grid = np.linspace(FORMULAS[name].low, FORMULAS[name].high, 201)
    points = jnp.stack(jnp.meshgrid(grid, grid), -1).reshape(-1, 2)
    values = jax.jit(jax.vmap(FORMULAS[name].value))(points)
    assert values.min() >= task.floor - 1e-4
    assert task.normalize(jnp.float32(task.floor)) == pytest.approx(0, abs=1e-4)


def test_a_quadratic_has_its_spectrum() -> None:
    spectrum = (3.0, 1.0, 0.2)
    for rotated in (False, True):
        task = Quadratic(eigenvalues=spectrum, columns=2, rotated=rotated)
        sample = task.sample(jax.random.key(3))
        x = {"x": jnp.ones((3, 2))}
        hessian = jax.hessian(lambda p, t, s: t.loss(p, {}, KEY, {}, s)[0])(x, task, sample)["x"]["x"]
        block = 2 * np.asarray(hessian)[:, 0, :, 0]  # columns are independent, each with the weight 1/2
        np.testing.assert_allclose(np.linalg.eigvalsh(block)[::-1], spectrum, atol=1e-5)
        np.testing.assert_allclose(np.asarray(hessian)[:, 0, :, 1], 0, atol=1e-6)
        assert (np.abs(block - np.diag(spectrum)).max() > 0.1) == rotated
    assert np.abs(task.sample(jax.random.key(4)) - sample).max() > 0.1


def test_noise_has_its_size_and_no_mean() -> None:
    task, quiet = (Quadratic(eigenvalues=(2.0, 1.0), columns=3, rotated=False, noise=n) for n in (0.5, 0.0))
    params, _ = task.init(KEY)
    gradient = jax.grad(lambda p, t, k: t.loss(p, {}, k, {})[0])
    exact = gradient(params, quiet, KEY)["x"]
    many = jax.vmap(lambda k: gradient(params, task, k)["x"] - exact)(jax.random.split(KEY, 4000))
    np.testing.assert_allclose(3 * many.std(0), 0.5, rtol=0.1)
    np.testing.assert_allclose(many.mean(0), 0, atol=5 * 0.5 / 3 / np.sqrt(4000))


@pytest.mark.parametrize(
    ("task", "change", "words"),
    [
        (Quadratic, {"eigenvalues": (1.0, -1.0)}, r"eigenvalues = \(1.0, -1.0\) .*>= 0"),
        (Quadratic, {"eigenvalues": ()}, r"eigenvalues = \(\) .*1 to 65536"),
        (Quadratic, {"rotated": 1}, "rotated = 1 .*True or False"),
        (Quadratic, {"noise": float("nan")}, "noise = nan .*finite number >= 0"),
        (Quadratic, {"columns": 0}, "columns = 0 .*>= 1"),
        (Analytic, {"dimension": 1}, "dimension = 1 .*>= 2"),
        (Analytic, {"formula": "rosenbrok"}, "did you mean 'rosenbrock'"),
    ],
)
def test_values_out_of_range(task: type, change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        task(**change)
