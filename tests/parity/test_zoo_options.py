"""The options of the published classes that no recorded file exercises, through the twins."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from made_recordings import header, random_theta
from numpy.testing import assert_allclose

from celo_nnx import recordings
from celo_nnx.recordings.twins import twin_optimizer

CELO = {"lstm_hidden_size": 5, "param_inits": 2, "ff_hidden_size": 3, "train_phase": 2}
SMALL: dict[str, dict] = {
    "celo.optimizers.celo.Celo": CELO,
    "celo.optimizers.celo_adam.Celo": {"lstm_hidden_size": 5},
    "celo.optimizers.velo.HyperV2": {name: x for name, x in CELO.items() if name != "train_phase"},
    "celo.optimizers.rnn_mlp_lopt.RNNMLPLOpt": {
        "lstm_hidden_size": 5,
        "hidden_size": 4,
        "decays": [0.5, 0.9],
    },
    "celo.optimizers.adafac_mlp_lopt.AdafacMLPLOpt": {"hidden_size": 3},
    "celo.optimizers.nn_adam.NNAdam": {"lstm_hidden_size": 5},
}
SHAPES = {"w": (2, 3), "x": (4,)}
STEPS = 4


def _spec(reference, constructor, shapes=SHAPES):
    leaves = {key: (shape, None, [0, 1] if len(shape) > 1 else None) for key, shape in shapes.items()}
    probe = recordings.Recording("probe", header(reference, constructor, leaves, STEPS), {}, None)
    return recordings.spec(probe, list(shapes.items()))


def _theta(spec, seed=5):
    probe = recordings.Recording("probe", {}, random_theta(spec, seed), None)
    return recordings.theta(probe, spec)


def _path(rule, theta, shapes=SHAPES, steps=STEPS):
    """Returns the updates of a few steps on random gradients; large ones, so that clipping shows."""
    rng = np.random.default_rng(1)
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    grads = {k: jnp.asarray(rng.normal(size=(steps, *s)), jnp.float32) for k, s in shapes.items()}
    losses = jnp.asarray([2.0, 1.9, 2.1, 1.5][:steps], jnp.float32)
    rule = rule.with_theta(theta)

    def step(carry, fed):
        params, state = carry
        updates, state = rule.update(fed[0], state, params, value=fed[1])
        return (jax.tree.map(jnp.add, params, updates), state), updates

    start = (params, rule.init(params, 7))
    return jax.jit(lambda start: jax.lax.scan(step, start, (grads, losses))[1])(start)


def _distance(a, b):
    """The largest difference relative to the largest update."""
    size = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(a))
    return (
        max(float(jnp.max(jnp.abs(x - y))) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)) / size
    )


OPTIONS = {
    "celo.optimizers.celo.Celo": {
        "exp_mult": 0.5,
        "step_mult": 0.1,
        "train_phase": 1,
        "param_scale_mult": False,
        "precondition_output": True,
        "clip_param_scale_amount": 0.1,
        "rnn_state_decay": 0.5,
        "constant_loss": True,
        "initial_momentum_decays": [0.5, 0.6, 0.7],
        "initial_rms_decays": [0.5],
        "initial_adafactor_decays": [0.5, 0.6, 0.7],
    },
    "celo.optimizers.celo_adam.Celo": {
        "initial_epsilon": 0.1,
        "mom_decay": False,
        "param_scale_mult": True,
        "initial_rms_decays": [0.9],
    },
    "celo.optimizers.velo.HyperV2": {
        "ff_mult": 3.0,
        "use_bugged_next_lstm_state": True,
        "use_bugged_loss_features": False,
    },
    "celo.optimizers.rnn_mlp_lopt.RNNMLPLOpt": {"magnitude_rate": 0.5, "step_multiplier": 0.1},
    "celo.optimizers.adafac_mlp_lopt.AdafacMLPLOpt": {"exp_mult": 0.5, "initial_rms_decays": [0.5]},
    "celo.optimizers.nn_adam.NNAdam": {"output_scale": 0.5, "decay_strength": 0.9},
}
INERT = {
    "celo.optimizers.celo.Celo": {
        "summarize_each_layer": False,
        "reparam_decay": 0.1,
        "validation_mode": True,
    },
    "celo.optimizers.celo_adam.Celo": {"train_phase": 7, "param_inits": 9, "clip_param_scale_amount": 1e-3},
    "celo.optimizers.nn_adam.NNAdam": {"initial_learning_rate": 0.5},
}


@pytest.mark.parametrize("reference", SMALL)
def test_every_option_has_its_effect(reference):
    """Each listed field changes the path by far more than rounding, the inert ones not at all."""
    shapes = {"w": SHAPES["w"]}
    base = _spec(reference, SMALL[reference], shapes)
    theta = _theta(base)
    start = _path(twin_optimizer(base), theta, shapes)
    for name, value in OPTIONS[reference].items():
        other = _path(
            twin_optimizer(_spec(reference, SMALL[reference] | {name: value}, shapes)), theta, shapes
        )
        assert _distance(start, other) > 1e-4, name
    if reference in INERT:
        other = _path(
            twin_optimizer(_spec(reference, SMALL[reference] | INERT[reference], shapes)), theta, shapes
        )
        assert _distance(start, other) == 0.0


def test_a_bank_is_shrunk_by_its_size():
    """Equal MLPs with any controls: softmax adds up to 1, so the mean is one MLP divided by K."""
    one = _spec("celo.Celo", CELO | {"param_inits": 1})
    three = _spec("celo.Celo", CELO | {"param_inits": 3})
    theta, random = _theta(one), _theta(three)
    bank = {"update_rule": jax.tree.map(lambda x: np.repeat(x, 3, axis=0), theta["update_rule"])}
    bank["schedule"] = theta["schedule"] | {"controls": random["schedule"]["controls"]}
    third = theta | {"update_rule": jax.tree.map(lambda x: x / np.float32(3), theta["update_rule"])}
    assert _distance(_path(twin_optimizer(three), bank), _path(twin_optimizer(one), third)) < 1e-5


def test_velo_weighs_raw():
    """With heads that give 1 at every tensor and a bank of one, VeLO is Celo's first phase."""
    celo, velo = "celo.optimizers.celo.Celo", "celo.optimizers.velo.HyperV2"
    first = _spec(celo, CELO | {"param_inits": 1, "train_phase": 1})
    spec = _spec(velo, SMALL[velo] | {"param_inits": 1, "ff_mult": 0.5})
    theta, other = _theta(first), _theta(spec)
    heads = {name: {"w": np.zeros((5, 1), np.float32)} for name in ("controls", "step")}
    heads["controls"]["b"], heads["step"]["b"] = np.full(1, 2, np.float32), np.ones(1, np.float32)
    other = {"update_rule": theta["update_rule"], "schedule": other["schedule"] | heads}
    assert _distance(_path(twin_optimizer(spec), other), _path(twin_optimizer(first), theta)) < 1e-5


@pytest.mark.parametrize("phase", [1, 2])
def test_the_second_phase_scales_the_step(phase):
    """A step head of zeros gives the rate 0.1 in phase 2 and plays no part in phase 1."""
    spec = _spec("celo.Celo", CELO | {"train_phase": phase})
    theta = _theta(spec)
    theta["schedule"] = theta["schedule"] | {"step": jax.tree.map(np.zeros_like, theta["schedule"]["step"])}
    first = _path(twin_optimizer(_spec("celo.Celo", CELO | {"train_phase": 1})), theta, steps=1)
    got = _path(twin_optimizer(spec), theta, steps=1)
    scaled = jax.tree.map(lambda x: x * (0.1 if phase == 2 else 1.0), first)
    assert _distance(scaled, got) < 1e-6


@pytest.mark.parametrize("correction", [True, False])
def test_celo_adam_at_a_constant_rate_is_adam(correction):
    """Follows ``optax.scale_by_adam`` with the floor inside its root, at rate 0.1 * step_mult."""
    spec = _spec("celo_adam.Celo", {"lstm_hidden_size": 5, "mom_decay": correction, "step_mult": 0.01})
    theta = _theta(spec)
    theta["schedule"] = theta["schedule"] | {"step": jax.tree.map(np.zeros_like, theta["schedule"]["step"])}
    got = _path(twin_optimizer(spec), theta)
    rng = np.random.default_rng(1)
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}
    grads = {k: jnp.asarray(rng.normal(size=(STEPS, *s)), jnp.float32) for k, s in SHAPES.items()}
    adam = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8, eps_root=1e-10)
    m, v = optax.ema(0.9, debias=False), optax.ema(0.999, debias=False)

    def step(state, g):
        if correction:
            u, state = adam.update(g, state)
            return state, u
        first, s0 = m.update(g, state[0])
        second, s1 = v.update(jax.tree.map(jnp.square, g), state[1])
        return (s0, s1), jax.tree.map(lambda a, b: a / (jnp.sqrt(b + 1e-10) + 1e-8), first, second)

    start = adam.init(params) if correction else (m.init(params), v.init(params))
    want = jax.lax.scan(step, start, grads)[1]
    for key in SHAPES:
        assert_allclose(-got[key], 1e-3 * want[key], rtol=2e-5, err_msg=key)


def test_nn_adam_without_heads():
    """Numbers stay at theta's, and moments are not bias-corrected."""
    spec = _spec("NNAdam", SMALL["celo.optimizers.nn_adam.NNAdam"])
    theta = _theta(spec)
    natural = {"lr": 0.01, "b1": 0.9, "b2": 0.99, "eps": 1e-3}
    stored = {k: np.float32(0.1 * np.log(1 - x if k in ("b1", "b2") else x)) for k, x in natural.items()}
    heads = jax.tree.map(np.zeros_like, theta["schedule"]["heads"])
    got = _path(twin_optimizer(spec), {"schedule": theta["schedule"] | stored | {"heads": heads}})
    rng = np.random.default_rng(1)
    for shape in SHAPES.values():
        rng.normal(size=shape)
    for key, shape in SHAPES.items():
        m = v = np.zeros(shape)
        for i, g in enumerate(rng.normal(size=(STEPS, *shape)).astype(np.float32)):
            m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g.astype(np.float64) ** 2
            want = 0.01 * (1 + 1e-3) / (1e-3 + np.sqrt(v + 1e-10)) * m
            assert_allclose(-got[key][i], want, rtol=2e-4, err_msg=f"{key} {i}")


def test_decays_of_the_adafac_mlp_are_learned():
    """An offset moves a decay to 1 - (1 - d) exp(10 offset): two ways to the same decay agree."""
    reference = "celo.optimizers.adafac_mlp_lopt.AdafacMLPLOpt"
    spec = _spec(reference, SMALL[reference])
    theta = _theta(spec)
    zero = jax.tree.map(np.zeros_like, theta["accumulators"])
    offset = np.log(2.0) / 10  # doubles 1 - d
    moved = jax.tree.map(lambda x: np.full_like(x, offset), zero)
    banks = {"initial_momentum_decays": [0.8, 0.98, 0.998], "initial_rms_decays": [0.998]}
    banks |= {"initial_adafactor_decays": [0.8, 0.98, 0.998]}
    told = twin_optimizer(_spec(reference, SMALL[reference] | banks))
    got = _path(twin_optimizer(spec), theta | {"accumulators": moved})
    assert _distance(_path(told, theta | {"accumulators": zero}), got) < 1e-4
    assert _distance(_path(twin_optimizer(spec), theta | {"accumulators": zero}), got) > 1e-2
