"""Training curves: known answers, a plain loop, divergence and the edges of the grid."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from celo_nnx.errors import UserError
from celo_nnx.evaluation import curves
from celo_nnx.interfaces import Task


@dataclasses.dataclass(frozen=True)
class Quadratic(Task):
    """loss = curvature/2 |x|^2 from x = 1: gradient descent gives (1 - lr * curvature)^(2t) * curvature."""

    curvature: float = 2.0

    def init(self, key, sample=()):
        return {"x": jnp.ones(2)}, ()

    def loss(self, params, state, key, batch, sample=()):
        return 0.5 * self.curvature * jnp.sum(params["x"] ** 2), state, {}

    def draw(self, data, key, start, count):
        return ()


@dataclasses.dataclass(frozen=True)
class Regression(Task):
    """Least squares on drawn rows, from a random start."""

    def init(self, key, sample=()):
        return {"w": jax.random.normal(key, (3,)), "b": jnp.zeros(())}, ()

    def loss(self, params, state, key, batch, sample=()):
        error = batch["x"] @ params["w"] + params["b"] - batch["y"]
        return jnp.mean(error**2), state, {}

    def draw(self, data, key, start, count):
        rows = jax.random.randint(key, (4,), start, start + count)
        return {name: value[rows] for name, value in data.items()}


def regression_data():
    x = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    return {"x": x, "y": x @ np.array([1.0, -2.0, 0.5], np.float32)}


def test_gradient_descent_on_a_quadratic_has_the_known_curve():
    rates = [0.1, 0.25]
    losses = curves.train_curves(optax.sgd, Quadratic(), {}, learning_rates=rates, seeds=[0, 1, 2], steps=12)
    t = np.arange(12)
    for rate, rows in zip(rates, losses, strict=True):
        expected = 2.0 * (1 - 2.0 * rate) ** (2 * t)
        np.testing.assert_allclose(rows, np.broadcast_to(expected, (3, 12)), rtol=1e-5)


def test_adam_equals_a_plain_loop():
    task, data = Regression(), regression_data()
    losses = curves.train_curves(optax.adam, task, data, learning_rates=[0.01, 0.1], seeds=[3, 7], steps=9)
    for i, rate in enumerate([0.01, 0.1]):
        for j, seed in enumerate([3, 7]):
            _, init_key, step_key = jax.random.split(jax.random.key(seed), 3)
            params, _ = task.init(init_key)
            tx = optax.adam(rate)
            state, seen = tx.init(params), []
            for t in range(9):
                draw_key, _ = jax.random.split(jax.random.fold_in(step_key, t))
                batch = task.draw({k: jnp.asarray(v) for k, v in data.items()}, draw_key, 0, 20)
                loss, grads = jax.value_and_grad(lambda p, b=batch: task.loss(p, (), None, b)[0])(params)
                updates, state = tx.update(grads, state, params)
                params = optax.apply_updates(params, updates)
                seen.append(float(loss))
            np.testing.assert_allclose(losses[i, j], seen, rtol=1e-4)
    assert not np.allclose(losses[:, 0], losses[:, 1])


def test_two_devices_give_the_same_curves_and_padding_is_cut(tmp_path):
    arguments = dict(learning_rates=[0.01, 0.03, 0.1], seeds=[5], steps=6)
    program = (
        "import sys, runpy, jax, optax, numpy as np\n"
        "jax.config.update('jax_num_cpu_devices', 2)\n"
        "from celo_nnx.evaluation import curves\n"
        "here = runpy.run_path(sys.argv[1])\n"
        "task, data = here['Regression'](), here['regression_data']()\n"
        f"losses = curves.train_curves(optax.adam, task, data, **{arguments})\n"
        "assert jax.local_device_count() == 2\n"
        "np.save(sys.argv[2], losses)\n"
    )
    subprocess.run([sys.executable, "-c", program, __file__, str(tmp_path / "losses.npy")], check=True)
    alone = curves.train_curves(optax.adam, Regression(), regression_data(), **arguments)
    np.testing.assert_allclose(np.load(tmp_path / "losses.npy"), alone, rtol=1e-5)


def test_context_reuses_the_compilation():
    def make(rate, scale):
        return optax.chain(optax.scale(scale), optax.sgd(rate))

    arguments = dict(learning_rates=[0.1], seeds=[0], steps=3)
    before = curves._train._cache_size()
    whole = curves.train_curves(make, Quadratic(), {}, context=(jnp.float32(1.0),), **arguments)
    half = curves.train_curves(make, Quadratic(), {}, context=(jnp.float32(0.5),), **arguments)
    assert curves._train._cache_size() == before + 1
    np.testing.assert_allclose(whole[0, 0], 2.0 * 0.8 ** (2 * np.arange(3)), rtol=1e-5)
    np.testing.assert_allclose(half[0, 0], 2.0 * 0.9 ** (2 * np.arange(3)), rtol=1e-5)


def test_a_diverged_run_is_infinite_and_counted():
    losses = curves.train_curves(
        optax.sgd, Quadratic(), {}, learning_rates=[0.1, 1e20], seeds=[0, 1], steps=40
    )
    assert np.isfinite(losses[0]).all()
    assert np.isposinf(losses[1, :, 5:]).all() and np.isfinite(losses[1, :, 0]).all()
    tuned = curves.tune(losses, [0.1, 1e20])
    assert tuned.best == 0 and np.isposinf(tuned.final[1]).all()


def test_tune_takes_the_median_and_warns_at_an_edge():
    final = np.array([[5.0, 5.0, 5.0], [0.0, 3.0, np.inf], [1.0, 1.5, np.inf], [4.0, 0.0, 4.0]])
    losses = np.repeat(final[..., None], 20, axis=-1)
    tuned = curves.tune(losses, [1e-3, 1e-2, 1e-1, 1.0])
    assert (tuned.learning_rate, tuned.median, tuned.warning) == (1e-1, 1.5, "")
    np.testing.assert_array_equal(tuned.medians, [5.0, 3.0, 1.5, 4.0])
    assert "upper edge" in curves.tune(losses[:3], [1e-3, 1e-2, 1e-1]).warning
    assert "lower edge" in curves.tune(losses[2:], [1e-1, 1.0]).warning
    assert "diverged at every" in curves.tune(np.full((2, 3, 4), np.inf), [1e-1, 1.0]).warning


def test_final_loss_is_the_mean_of_the_last_twentieth():
    assert curves.final_losses(np.arange(100.0)) == pytest.approx(97.0)
    assert curves.final_losses(np.arange(7.0)) == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"seeds": []}, "seeds"),
        ({"learning_rates": []}, "learning_rates"),
        ({"learning_rates": [0.1, -1.0]}, "learning_rates"),
    ],
)
def test_bad_arguments_are_told_in_one_line(change, words):
    arguments = {"learning_rates": [0.1], "seeds": [0], "steps": 2, **change}
    with pytest.raises(UserError, match=words) as caught:
        curves.train_curves(optax.sgd, Quadratic(), {}, **arguments)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="ascending"):
        curves.tune(np.ones((2, 1, 1)), [0.2, 0.1])
