"""The composed optimizer against the plain twin on random trees, and against Muon with hand-made weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers as Dimensions

from celo_nnx.build import build
from celo_nnx.config import load
from celo_nnx.naive import NaiveCelo2, from_config

# Ranks 0 to 5, axes of size 1, equal axes; few, since compiling a tensor takes a second.
SHAPES = {
    "scalar": (),
    "tall": (20, 3),
    "row": (1, 6),
    "stack": (2, 8, 3),
    "thin": (3, 1, 1, 5),
    "five": (2, 1, 3, 4, 3),
    "linear/b": (4,),
}
STEPS = 4


def _theta(like, seed=0):
    leaves, tree = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return tree.unflatten(noisy)


def _params(seed=1):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}


def _grads(kind, seed=2):
    rng = np.random.default_rng(seed)
    grads = {k: rng.normal(size=(STEPS, *s)).astype(np.float32) for k, s in SHAPES.items()}
    if kind == "huge":
        grads = {k: 1e6 * g for k, g in grads.items()}
    if kind == "zeros":
        for g in grads.values():
            g[::2] = 0.0
    return {k: jnp.asarray(g) for k, g in grads.items()}


def _updates(rule, theta, params, grads):
    """All updates of a few steps, under scan."""
    rule = rule.with_theta(theta)

    def step(carry, g):
        params, state = carry
        u, state = rule.update(g, state, params, value=jnp.zeros(()))
        return (jax.tree.map(jnp.add, params, u), state), u

    return jax.lax.scan(step, (params, rule.init(params, STEPS)), grads)[1]


def _pair(name, decay=0.1):
    config = load(name).optimizer.to_dict()
    config |= {"weight_decay": decay, "schedule": {"kind": "constant", "value": 1.0}}
    config["tensors"] |= {"axes": "last_two"}
    return build(config), from_config(ConfigDict(config))


@pytest.mark.parametrize(
    ("name", "keys"),
    [("celo2_base", ("scalar", "row", "thin", "five")), ("celo2_published", ("tall", "stack", "linear/b"))],
)
def test_random_trees(name, keys):
    """Steps of scale 1 agree to rounding: ranks 0 to 5, zero and huge gradients, particles under vmap."""
    composed, twin = _pair(name)
    theta = jax.tree.map(lambda *x: jnp.stack(x), *[_theta(composed.theta, seed) for seed in range(2)])
    kinds = [_grads(kind) for kind in ("plain", "zeros", "huge")]
    grads = {key: jnp.stack([kind[key] for kind in kinds]) for key in keys}
    params = {key: x for key, x in _params().items() if key in keys}

    def run(rule):
        over_kinds = jax.vmap(lambda theta, g: _updates(rule, theta, params, g), (None, 0))
        return jax.jit(jax.vmap(over_kinds, (0, None)))(theta, grads)

    got, want = run(composed), run(twin)
    for key in keys:
        assert np.all(np.isfinite(got[key])), key
        # Huge gradients are clipped to 1000 on learned tensors; Adam's are not, and its steps reach 20 * 4.
        np.testing.assert_allclose(got[key], want[key], rtol=2e-4, atol=2e-4, err_msg=key)


def test_a_tie_of_factored_axes_is_taken_from_the_table():
    """And the tolerance of these comparisons is far below what a swap of the axes changes."""
    axes = (1, 0)
    config = load("celo2_base").optimizer.to_dict()
    config["tensors"] = {"axes": "last_two", "matrix": (), "factored": (("w", *axes),)}
    config["schedule"] = {"kind": "constant", "value": 1.0}
    composed = build(config)
    theta = _theta(composed.theta)
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(6, 6)), jnp.float32)}
    grads = {"w": jnp.asarray(rng.normal(size=(STEPS, 6, 6)), jnp.float32)}
    twin = NaiveCelo2(None, orthogonalize=False, learning_rate=1.0, factored_axes=lambda path, shape: axes)
    swapped = NaiveCelo2(
        None, orthogonalize=False, learning_rate=1.0, factored_axes=lambda path, shape: axes[::-1]
    )
    got, want, wrong = (_updates(r, theta, params, grads)["w"] for r in (composed, twin, swapped))
    np.testing.assert_allclose(got, want, atol=2e-4)
    assert float(jnp.max(jnp.abs(got - wrong))) > 1e-2


def test_hand_made_theta_is_muon():
    """Follows ``scale_by_muon`` with EMA momentum .9, both RMS-normalized, at gradient scale 1."""
    config = load("celo2_published").optimizer.to_dict()
    config |= {"schedule": {"kind": "constant", "value": 1.0}, "routing": {"kind": "single"}}
    rule = build(config, theta_init={"kind": "hand_made"})
    rng = np.random.default_rng(3)
    shapes = {"tall": (40, 12), "wide": (4, 9), "conv": (3, 3, 4, 6)}
    params = {k: jnp.zeros(s) for k, s in shapes.items()}
    grads = {k: jnp.asarray(rng.normal(size=(12, *s)), jnp.float32) for k, s in shapes.items()}
    got = jax.jit(lambda g: _updates(rule, rule.theta, params, g))(grads)

    def dimensions(tree):
        return jax.tree.map(lambda x: Dimensions(x.ndim - 2, x.ndim - 1), tree)

    muon = optax.contrib.scale_by_muon(beta=0.9, nesterov=False, weight_dimension_numbers=dimensions)

    def step(state, g):
        u, state = muon.update(g, state, params)
        return state, u

    want = jax.jit(lambda g: jax.lax.scan(step, muon.init(params), g)[1])(grads)
    for key in shapes:
        rms = jnp.sqrt(jnp.mean(want[key] ** 2, axis=(-2, -1), keepdims=True))
        np.testing.assert_allclose(-got[key], want[key] / rms, atol=1e-5, err_msg=key)
