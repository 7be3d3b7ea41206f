"""Numbers that are not finite, put where they can arise: counted by family, handled as stated, theta safe."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from celo_nnx.meta.estimators import ESTIMATORS
from celo_nnx.meta.meta_optimizers import adamw, meta_optimizer
from celo_nnx.meta.truncation import Constant

BAD = [float("nan"), float("inf"), -float("inf"), 1e38]


@jax.custom_jvp
def spoil(w: Any, factor: Any) -> Any:
    """The identity, whose gradient is multiplied by a factor."""
    return w


@spoil.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return primals[0], tangents[0] * primals[1]


@functools.cache
def faulty(toy: Any) -> Any:
    @dataclasses.dataclass(frozen=True)
    class Faulty(toy.Quadratic):
        """A batch above 2 puts itself in the place of the loss, one below -2 multiplies the gradient."""

        def loss(self, params: Any, state: Any, key: Any, batch: Any, sample: Any = ()) -> Any:
            x = batch["x"]
            factor = jnp.where(batch["where"] == 1, x, 1.0)
            loss = 0.5 * jnp.square(spoil(params["w"], factor) - self.target)
            return jnp.where(batch["where"] == 2, x, loss), state, {}

    return Faulty(noise=0.0)


def family(toy: Any, name: str, where: int = 0, value: float = 0.0, share: int = 1) -> Any:
    """Ten batches of which ``share`` have a fault; ``where``: 1 the gradient, 2 the loss, 0 nowhere."""
    x = np.zeros(10, np.float32)
    x[:share] = value
    data = {"x": x, "where": np.where(np.arange(10) < share, where, 0).astype(np.int32)}
    return toy.Family(name, faulty(toy), data, data)


@pytest.fixture(scope="module")
def one_truncation(toy):
    """A program for all faults: what differs is data."""
    families = [family(toy, "good"), family(toy, "bad")]
    options = {"pairs": 4, "std": 0.1, "truncation": 20, "unroll": Constant(length=40)}
    estimator = ESTIMATORS["pes"](toy.Drift(), families, initial_offset="none", **options)

    @toy.jit
    def run(data, theta):
        bound = estimator.with_data(data)
        state = bound.init(theta, jax.random.key(0))
        return bound(theta, state, jax.random.key(1))

    def call(where: int, value: float):
        made = ESTIMATORS["pes"](
            toy.Drift(), [family(toy, "good"), family(toy, "bad", where, value)], **options
        )
        return run(made.data, {"drift": jnp.float32(0.0)})

    return call


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("where", [1, 2])
def test_inner_losses_and_gradients(one_truncation, where, value):
    gradient, _, metrics = one_truncation(where, value)
    clean, _, _ = one_truncation(0, 0.0)
    good, bad = (int(n) for n in metrics["nonfinite"])
    assert good == 0 and (bad > 0 or np.isfinite(value))
    if where == 1 or not np.isfinite(value):  # a spoilt gradient spoils all losses until the trajectory ends
        assert bad > 0 and bad % 2 == 0  # both sides see the same batches
    assert np.isfinite(gradient["drift"]) and np.isfinite(metrics["loss"])
    assert not np.any(metrics["nonfinite_gradient"]) and int(metrics["nonfinite_theta"]) == 0
    assert float(gradient["drift"]) != float(clean["drift"])


def problems_of(state: Any) -> Any:
    return state if hasattr(state, "params") else state.problems


def with_parameter(state: Any, pair: int, value: float) -> Any:
    """One side of one pair with another parameter."""
    problems = problems_of(state)
    params = {"w": problems.params["w"].at[pair, 0].set(value)}
    spoilt = problems._replace(params=params)
    return spoilt if problems is state else state._replace(problems=spoilt)


@pytest.mark.parametrize("kind", ["pes", "shared_noise", "truncated_es", "truncated_backprop"])
def test_one_particle_takes_no_other_with_it(toy, kind):
    """A pair whose estimate is not finite is left out: the sum over which pair it is leaves each out once."""

    class Raw(toy.Quadratic):
        def normalize(self, loss):
            return loss

    families = [toy.family("a", Raw(noise=0.3)), toy.family("b", Raw(noise=0.3), 0.0, 2.0)]
    options = {} if kind == "truncated_backprop" else {"std": 0.1}
    estimator = ESTIMATORS[kind](
        toy.Drift(), families, pairs=2, truncation=4, unroll=Constant(length=50), **options
    )
    theta = {"drift": jnp.float32(0.3)}
    (state,) = estimator.init(theta, jax.random.key(5))
    run = toy.jit(lambda state: estimator(theta, [state], jax.random.key(6)))
    whole, _, clean = run(state)
    assert not np.any(clean["nonfinite"]) and not np.any(clean["nonfinite_gradient"])
    total = 0.0
    for pair in range(4):
        gradient, (after,), metrics = run(with_parameter(state, pair, float("nan")))
        total += float(gradient["drift"])
        counted = [1, 0] if pair < 2 else [0, 1]
        assert metrics["nonfinite_gradient"].tolist() == counted
        sides = 2 if kind == "truncated_es" else 1  # both sides begin where the positive one stood
        assert metrics["nonfinite"].tolist() == [4 * sides * n for n in counted]
        others = np.isfinite(np.asarray(problems_of(after).params["w"])).all(1)
        assert others.tolist() == [i != pair for i in range(4)]
    np.testing.assert_allclose(total, 3 * float(whole["drift"]), rtol=1e-4)


class Given:
    """An estimator that returns the gradient it was made with."""

    def __init__(self, gradient: list[float]) -> None:
        self.gradient = np.array(gradient, np.float32)

    def init(self, theta: Any, key: Any, iteration: Any = 0) -> Any:
        return jnp.zeros(())

    def __call__(self, theta: Any, state: Any, key: Any, iteration: Any = 0) -> Any:
        zero = jnp.zeros(1)
        counts = {"nonfinite": zero.astype(int), "nonfinite_gradient": zero.astype(int)}
        metrics = {"loss": zero[0], "family_loss": zero, "nonfinite_theta": jnp.int32(0), **counts}
        return {"w": jnp.asarray(self.gradient)}, state, metrics


def trained(toy: Any, gradient: list[float], rule: Any) -> tuple[np.ndarray, list[int]]:
    optimizer = toy.Drift({"w": jnp.zeros(3)})
    trainer = toy.MetaTrainer(optimizer, Given(gradient), rule, iterations_per_dispatch=2)
    state, metrics = trainer.run(trainer.init(jax.random.key(0)), 2)
    return np.asarray(state["theta"]["w"]), metrics["nonfinite_theta"].tolist()


def test_thetas_gradient_and_theta(toy):
    """A huge gradient is finite: clipping its norm keeps theta. Entries of a theta that is lost count."""
    huge = [1e30, 1.0, 0.0]
    kept, counts = trained(toy, huge, adamw(learning_rate=0.1, clip_norm=1.0, weight_decay=0.0))
    assert counts == [0, 0] and np.isfinite(kept).all()
    lost, counts = trained(toy, huge, meta_optimizer({"kind": "sgd", "learning_rate": 1e10}))
    assert counts == [1, 1] and np.isfinite(lost).tolist() == [False, True, True]


def test_the_sum_of_estimates(toy, monkeypatch):
    """Entries of theta's gradient that are not finite become 0 and are counted."""
    estimator = ESTIMATORS["pes"](toy.Drift(), [toy.family()], pairs=2, std=0.1, truncation=2)
    theta = {"a": jnp.zeros(2), "b": jnp.zeros(())}
    sums = jnp.array([np.nan, 3.0, np.inf]), [], {"loss": jnp.float32(1.0)}
    monkeypatch.setattr(estimator.population, "each", lambda *_: sums)
    gradient, _, metrics = estimator(theta, [], jax.random.key(0))
    assert gradient["a"].tolist() == [0.0, 3.0] and float(gradient["b"]) == 0.0
    assert int(metrics["nonfinite_theta"]) == 2
