"""Estimators on real optimizers: reverse mode against finite differences, and short runs from configs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from celo_nnx.build import build
from celo_nnx.config import load
from celo_nnx.interfaces import Family
from celo_nnx.meta import build_trainer
from celo_nnx.meta.estimators import ESTIMATORS, TruncatedBackprop
from celo_nnx.meta.truncation import Constant
from celo_nnx.tasks import build_families
from celo_nnx.tasks.image_mlp import ImageMLP


@pytest.mark.parametrize("name", ["celo2", "celo_phase1"])
def test_backprop_through_an_optimizer_agrees_with_finite_differences(toy, name):
    # A learning rate at which what theta does to the loss stands out of float32's rounding.
    optimizer = build(load(name, ["optimizer.schedule.value=0.1"]).optimizer, jax.random.key(0))
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(20, 4)).astype(np.float32), "y": rng.integers(0, 3, 20).astype(np.int32)}
    task = ImageMLP(features=4, hidden=(), classes=3, activation="relu", batch_size=8, normalizer_clip=1.5)
    estimator = TruncatedBackprop(
        optimizer,
        [Family("linear", task, data, data)],
        pairs=2,
        truncation=5,
        unroll=Constant(length=3),
        initial_offset="none",
    )
    theta, key = optimizer.theta, jax.random.key(1)
    state = toy.jit(estimator.init)(theta, key)
    step = toy.jit(lambda theta: estimator(theta, state, key))
    gradient, _, metrics = step(theta)
    leaves = [np.asarray(x) for x in jax.tree.leaves(gradient)]
    assert all(np.all(np.isfinite(x)) for x in leaves) and int(metrics["nonfinite"][0]) == 0
    for seed in range(2):
        rng = np.random.default_rng(seed)
        way = [rng.normal(size=x.shape).astype(np.float32) for x in leaves]
        size, losses = 1e-4, []
        for sign in (1.0, -1.0):
            moved = [x + sign * size * d for x, d in zip(jax.tree.leaves(theta), way, strict=True)]
            losses.append(float(step(jax.tree.unflatten(jax.tree.structure(theta), moved))[2]["loss"]))
        slope = sum(np.sum(x * d) for x, d in zip(leaves, way, strict=True))
        np.testing.assert_allclose((losses[0] - losses[1]) / (2 * size), slope, rtol=0.02)


@pytest.mark.drill
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_a_short_run_of_every_estimator_changes_theta(kind):
    small = {"pairs": 2, "truncation": 3, "batches": 2}
    config = load("celo2:fast_digits", [f"meta.estimator.kind={kind}", "meta.unroll.kind=constant"])
    changes = ["meta.unroll.length=4", "run.iterations_per_dispatch=2"]
    sections = ["estimator.first", "estimator.second"] if kind == "mixture" else ["estimator"]
    for section in sections:
        known = config.meta.estimator if section == "estimator" else config.meta.estimator[section[10:]]
        changes += [f"meta.{section}.{name}={value}" for name, value in small.items() if name in known]
    config = load(config, changes)
    optimizer = build(config.optimizer, jax.random.key(0), config.theta_init.to_dict())
    trainer = build_trainer(config, optimizer, build_families(config.tasks))
    state, metrics = trainer.run(trainer.init(jax.random.key(0)), 2)
    assert int(state["iteration"]) == 2 and jnp.all(jnp.isfinite(metrics["loss"]))
    assert jnp.all(metrics["gradient_norm"] > 0) and not jnp.any(metrics["nonfinite"])
    changed = jax.tree.map(
        lambda a, b: jnp.any(a != b) & jnp.all(jnp.isfinite(a)), state["theta"], optimizer.theta
    )
    assert all(jax.tree.leaves(changed))
