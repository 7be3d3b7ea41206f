"""What the step is divided by, against the formula on the same rule's raw steps: whole, tiled, in blocks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from celo_nnx import UserError
from celo_nnx.build import build
from celo_nnx.config import load
from celo_nnx.naive import from_config

SMALL = (
    "optimizer.update_rule.hidden=(3,)",
    "optimizer.accumulators.momentum.decays=(0.9,)",
    "optimizer.accumulators.factored.decays=(0.9,)",
)
SHAPES = {"stack": (2, 12, 18), "wide": (24, 20), "wide2": (24, 20), "vector": (5,)}
STEPS = 4
KIND = "optimizer.output_normalization.kind"


def steps(*overrides: str) -> tuple[dict[str, np.ndarray], Any]:
    """Returns the steps of a few updates on gradients that grow tenfold each time, and the last state."""
    optimizer = build(load("celo2_base", (*SMALL, *overrides)).optimizer, jax.random.key(3))
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}
    scale = 10.0 ** np.arange(-STEPS, 0)
    grads = {k: rng.normal(size=(STEPS, *s)) for k, s in SHAPES.items()}
    grads = {
        k: jnp.asarray(x * scale.reshape(-1, *[1] * (x.ndim - 1)), jnp.float32) for k, x in grads.items()
    }

    def one(state: Any, grad: Any) -> Any:
        updates, state = optimizer.update(grad, state, params, learning_rate=1.0)
        return state, updates

    state, made = jax.jit(lambda: jax.lax.scan(one, optimizer.init(params, STEPS), grads))()
    return {k: -np.asarray(x, np.float64) for k, x in made.items()}, state


def axes_of(name: str, over: str) -> tuple[int, ...]:
    """The axes of the mean in ``[steps, *shape]``."""
    rank = len(SHAPES[name])
    if over == "rows" and rank > 1:
        return (rank,)
    return tuple(range(max(1, rank - 1), rank + 1))


@pytest.mark.parametrize("over", ["matrix", "rows"])
@pytest.mark.parametrize(
    "path", [(), ("optimizer.tile=80",), ("optimizer.tile=64", "optimizer.kernel=pallas")]
)
def test_the_rolling_average_is_bias_corrected_and_every_tensors_own(
    path: tuple[str, ...], over: str
) -> None:
    raw, _ = steps(*path, f"{KIND}=identity")
    options = ("decay=0.8", "eps=1e-12", "gain=0.5", f"axes={over}")
    options = tuple(f"optimizer.output_normalization.{option}" for option in options)
    got, state = steps(*path, f"{KIND}=rolling", *options)
    for name, y in raw.items():
        average, axes = 0.0, axes_of(name, over)
        square = np.mean(y * y, axes, keepdims=True)
        for t in range(STEPS):
            average = 0.8 * average + 0.2 * square[t]
            want = 0.5 * y[t] / np.sqrt(1e-12 + average / (1 - 0.8 ** (t + 1)))
            np.testing.assert_allclose(got[name][t], want, rtol=3e-4, atol=1e-5, err_msg=f"{name} {t}")
    kept = state["learned"]["24x20"]["output"]
    assert kept.shape == (2, 24 if over == "rows" else 1, 1) and kept.dtype == jnp.float32


def test_clipped_cuts_large_steps_and_passes_small_ones() -> None:
    raw, _ = steps(f"{KIND}=identity")
    sizes = {k: np.sqrt(np.mean(y * y, axes_of(k, "matrix"), keepdims=True)) for k, y in raw.items()}
    limit = float(np.median(np.concatenate([x.ravel() for x in sizes.values()])))
    got, _ = steps(f"{KIND}=clipped", f"optimizer.output_normalization.limit={limit}")
    passed = np.concatenate([(x <= limit).ravel() for x in sizes.values()])
    assert 0 < passed.sum() < passed.size
    for name, y in raw.items():
        np.testing.assert_allclose(got[name], y * np.minimum(1, limit / sizes[name]), rtol=3e-4, atol=1e-6)


def test_raw_steps_of_a_random_theta_are_as_the_grid_on_output_normalization_says() -> None:
    """Its ceiling of 0.1 is chosen for them."""
    rng, sizes = np.random.default_rng(1), []
    params = {"w": jnp.asarray(rng.normal(size=(64, 32)), jnp.float32), "b": jnp.zeros(32)}
    grads = [{k: jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32) for k, x in params.items()}] * 2
    for kind in ("newton_schulz", "identity"):
        parts = (
            f"{KIND}=identity",
            "optimizer.routing.kind=single",
            f"optimizer.orthogonalization.kind={kind}",
        )
        config = load("celo2", parts).optimizer
        optimizers = [build(config, jax.random.key(seed)) for seed in range(3)]
        theta = jax.tree.map(lambda *x: jnp.stack(x), *[optimizer.theta for optimizer in optimizers])

        def last(theta: Any, optimizer: Any = optimizers[0]) -> Any:
            optimizer, state = optimizer.with_theta(theta), optimizer.init(params)
            for grad in grads:
                updates, state = optimizer.update(grad, state, params, learning_rate=1.0)
            return jax.tree.map(lambda x: jnp.sqrt(jnp.mean(x * x)), updates)

        sizes += jax.tree.leaves(jax.jit(jax.vmap(last))(theta))
    sizes = np.concatenate(sizes)
    assert ((sizes > 0.04) & (sizes < 0.45)).all() and (sizes > 0.1).mean() > 0.5, sizes


def test_only_the_step_may_be_divided_by_an_average() -> None:
    with pytest.raises(UserError, match="optimizer.normalization.kind='rolling' keeps an average"):
        build(load("celo2_base", ["optimizer.normalization.kind=rolling"]).optimizer)
    config = load("celo2_base").optimizer.to_dict()
    config["accumulators"]["output"] = config["accumulators"]["momentum"]
    with pytest.raises(UserError, match="'output' is the name of another state"):
        build(config)


@pytest.mark.parametrize("slot", ["normalization", "output_normalization"])
def test_the_plain_twin_refuses_what_it_does_not_do(slot: str) -> None:
    config = load("celo2_base", [f"optimizer.{slot}.kind=clipped"]).optimizer
    with pytest.raises(UserError, match=f"{slot} of the plain twin 'clipped'"):
        from_config(config)
