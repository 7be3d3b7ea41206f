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
from celo_nnx.evaluation.baselines import Rule
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
    before = curves._compiled.cache_info().misses
    whole = curves.train_curves(make, Quadratic(), {}, context=(jnp.float32(1.0),), **arguments)
    half = curves.train_curves(make, Quadratic(), {}, context=(jnp.float32(0.5),), **arguments)
    assert curves._compiled.cache_info().misses == before + 1
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


def held_out_by_hand(task, data, params, seed_free_key, batches):
    losses = []
    for i in range(batches):
        draw_key, _ = jax.random.split(jax.random.fold_in(jax.random.key(seed_free_key), i))
        batch = task.draw({k: jnp.asarray(v) for k, v in data.items()}, draw_key, 0, len(data["x"]))
        losses.append(float(task.loss(params, (), None, batch)[0]))
    return np.mean(losses)


def test_held_out_losses_are_those_of_the_parameters_at_the_time():
    task, data = Regression(), regression_data()
    other = {"x": data["x"][:7] + 1.0, "y": data["y"][:7]}
    held_out = curves.HeldOut({"validation": other, "test": data}, every=2, batches=3)
    arguments = dict(learning_rates=[0.05], seeds=[3], steps=6)
    found = curves.train_runs(optax.sgd, task, data, held_out=held_out, **arguments)
    np.testing.assert_array_equal(found.losses, curves.train_curves(optax.sgd, task, data, **arguments))
    assert {k: v.shape for k, v in found.held_out.items()} == {"validation": (1, 1, 3), "test": (1, 1, 3)}
    _, init_key, step_key = jax.random.split(jax.random.key(3), 3)
    params, _ = task.init(init_key)
    for t in range(6):
        draw_key, _ = jax.random.split(jax.random.fold_in(step_key, t))
        batch = task.draw({k: jnp.asarray(v) for k, v in data.items()}, draw_key, 0, 20)
        grads = jax.grad(lambda p, b=batch: task.loss(p, (), None, b)[0])(params)
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)
        if t % 2:
            for name, examples in (("validation", other), ("test", data)):
                by_hand = held_out_by_hand(task, examples, params, curves.HELD_OUT_KEY, 3)
                assert found.held_out[name][0, 0, t // 2] == pytest.approx(by_hand, rel=1e-4)
    last = curves.train_runs(
        optax.sgd, task, data, held_out=dataclasses.replace(held_out, every=0), **arguments
    )
    np.testing.assert_allclose(last.held_out["test"][..., 0], found.held_out["test"][..., -1], rtol=1e-6)


def test_held_out_losses_are_taken_where_the_rule_says():
    found = curves.train_runs(
        optax.sgd,
        Quadratic(),
        {},
        learning_rates=[0.1],
        seeds=[0],
        steps=2,
        held_out=curves.HeldOut({"test": {}}, batches=1),
        eval_params=lambda state, params: jax.tree.map(lambda x: 10 * x, params),
    )
    assert found.held_out["test"][0, 0, 0] == pytest.approx(100 * 2.0 * 0.8**4, rel=1e-5)


def test_a_diverged_runs_held_out_losses_are_infinite_from_there_on():
    found = curves.train_runs(
        optax.sgd,
        Quadratic(),
        {},
        learning_rates=[0.1, 1e10],
        seeds=[0],
        steps=8,
        held_out=curves.HeldOut({"test": {}}, every=1),
    )
    diverged = np.isposinf(found.held_out["test"])
    assert not diverged[0].any() and diverged[1, 0, -5:].all() and not diverged[1, 0, 0]
    assert (diverged[1, 0] >= np.isposinf(found.losses[1, 0])).all()


def test_runs_in_turns_are_the_same_runs(monkeypatch):
    arguments = dict(learning_rates=[0.01, 0.03, 0.1], seeds=[5, 6], steps=5)
    at_once = curves.train_curves(optax.adam, Regression(), regression_data(), **arguments)
    monkeypatch.setattr(curves, "TOGETHER", 16)  # four runs of four parameters fit: two turns of three
    assert curves._together(Regression(), 6) == 3 and curves._together(Regression(), 5) == 3
    in_turns = curves.train_curves(optax.adam, Regression(), regression_data(), **arguments)
    np.testing.assert_allclose(in_turns, at_once, rtol=1e-5)
    monkeypatch.setattr(curves, "TOGETHER", 1)
    assert curves._together(Regression(), 6) == 1


def test_equal_rules_share_a_compilation():
    arguments = dict(learning_rates=[0.1], seeds=[0], steps=3)
    before = curves._compiled.cache_info().misses
    for _ in range(2):
        curves.train_curves(Rule("sgdm", "cosine", 3), Quadratic(), {}, **arguments)
    assert curves._compiled.cache_info().misses == before + 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"seeds": []}, "seeds"),
        ({"learning_rates": []}, "learning_rates"),
        ({"learning_rates": [0.1, -1.0]}, "learning_rates"),
        ({"held_out": curves.HeldOut({}, every=2), "steps": 3}, "every = 2"),
        ({"held_out": curves.HeldOut({}, batches=0)}, "batches = 0"),
    ],
)
def test_bad_arguments_are_told_in_one_line(change, words):
    arguments = {"learning_rates": [0.1], "seeds": [0], "steps": 2, **change}
    with pytest.raises(UserError, match=words) as caught:
        curves.train_runs(optax.sgd, Quadratic(), {}, **arguments)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="ascending"):
        curves.tune(np.ones((2, 1, 1)), [0.2, 0.1])
