"""Hand-made starts against what they say they are: optax's Adam, and plain rules written out in float64."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from celo_nnx.build import build
from celo_nnx.config import load
from celo_nnx.errors import UserError
from celo_nnx.optimizer import LearnedOptimizer

SHAPES = {"matrix": (6, 9), "vector": (5,), "scalar": ()}
STEPS = 20
LOSSES = np.linspace(2.0, 1.0, STEPS, dtype=np.float32) + np.float32(0.1) * np.cos(np.arange(STEPS))


def drawn(seed: int, *lead: int, spread: bool = False) -> dict[str, np.ndarray]:
    """Returns normal numbers like the tensors; ``spread`` over sizes 1e-6 to 1, so that epsilons show."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in SHAPES.items():
        size = 10.0 ** rng.uniform(-6, 0, size=shape) if spread else 1.0
        out[name] = (size * rng.normal(size=(*lead, *shape))).astype(np.float32)
    return out


def moved(opt: LearnedOptimizer, grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the updates ``[STEPS, *S]`` of one run, under scan."""

    def step(carry: tuple, fed: tuple) -> tuple:
        params, state = carry
        updates, state = opt.update(fed[0], state, params, value=fed[1])
        return (jax.tree.map(jnp.add, params, updates), state), updates

    params = jax.tree.map(jnp.asarray, drawn(0))
    run = jax.jit(lambda start: jax.lax.scan(step, start, (grads, LOSSES))[1])
    return jax.tree.map(np.asarray, run((params, opt.init(params, STEPS))))


def distance(got: dict[str, np.ndarray], want: dict[str, Any]) -> float:
    """Returns the largest difference of any update, relative to the largest update of its tensor."""
    worst = 0.0
    for name in SHAPES:
        a, b = (np.asarray(x[name], np.float64) for x in (got, want))
        assert np.all(np.isfinite(a))
        worst = max(worst, float(np.max(np.abs(a - b)) / np.max(np.abs(b))))
    return worst


def hand_made(preset: str, overrides: tuple[str, ...] = (), **options: Any) -> LearnedOptimizer:
    config = load(preset, list(overrides)).optimizer
    return build(config, jax.random.key(3), theta_init={"kind": "hand_made", **options})


# --- Adam -------------------------------------------------------------------------------------------------


def adam(grads: dict[str, np.ndarray], **options: float) -> dict[str, np.ndarray]:
    """Returns the updates of optax's Adam at the learning rate 1."""
    rule = optax.scale_by_adam(**options)

    def step(state: Any, g: Any) -> tuple:
        updates, state = rule.update(g, state)
        return state, jax.tree.map(jnp.negative, updates)

    run = jax.jit(lambda g: jax.lax.scan(step, rule.init(jax.tree.map(lambda x: x[0], g)), g)[1])
    return jax.tree.map(np.asarray, run(grads))


# 7/8 and 127/128 are float32 numbers, as are 1 minus them. Adam of optax rounds 1 - 0.9 another time.
EXACT, USUAL = (0.875, 0.9921875, 1e-6), (0.9, 0.999, 2e-5)


@pytest.mark.parametrize(("b1", "b2", "bound"), [EXACT, USUAL])
@pytest.mark.parametrize(("eps", "floor"), [(1e-8, 1e-10), (1e-3, 0.0)])
def test_celo_adam_is_adam(b1: float, b2: float, bound: float, eps: float, floor: float) -> None:
    """Celo-Adam whose schedule is hand-made, at a base rate of 1: with both epsilons in optax's places."""
    banks = (f"momentum.decays=({b1},)", f"second_moment.decays=({b2},)")
    sections = [f"accumulators.{text}" for text in banks]
    sections += [f"update_rule.eps={eps}", f"update_rule.floor={floor}", "schedule.value=1.0"]
    opt = hand_made("celo_adam", tuple(f"optimizer.{text}" for text in sections))
    grads = drawn(1, STEPS, spread=True)
    assert distance(moved(opt, grads), adam(grads, b1=b1, b2=b2, eps=eps, eps_root=floor)) < bound


CORRECTED = (
    "optimizer.accumulators.momentum.bias_correction=True",
    "optimizer.accumulators.second_moment.bias_correction=True",
    "optimizer.normalization.kind=identity",
    "optimizer.output_normalization.kind=identity",
    "optimizer.schedule.value=1.0",
)


@pytest.mark.parametrize(
    ("decays", "channel", "b2", "bound"),
    [
        ((0.875, 0.5, 0.96875), 0, 0.9921875, 1e-6),
        ((0.875, 0.5, 0.96875), 2, 0.9921875, 1e-6),
        ((0.9, 0.99, 0.999), 1, 0.95, 2e-5),
    ],
)
def test_celo2_base_can_be_adam(decays: tuple[float, ...], channel: int, b2: float, bound: float) -> None:
    """The group ``momentum_rms`` passed through, averages bias-corrected: Adam with epsilon in the root."""
    banks = (f"momentum.decays={decays}", f"second_moment.decays=({b2},)")
    overrides = (*CORRECTED, *(f"optimizer.accumulators.{text}" for text in banks))
    opt = hand_made("celo2_base", overrides, mix=(("momentum_rms", channel, 1.0),))
    grads = drawn(2, STEPS, spread=True)
    want = adam(grads, b1=decays[channel], b2=b2, eps=0.0, eps_root=1e-8)
    assert distance(moved(opt, grads), want) < bound


def test_nn_adam_is_adam_without_correction() -> None:
    """Its heads are zero, so its hyperparameters stay where theta has them."""
    grads = drawn(3, STEPS, spread=True)
    got = moved(hand_made("nn_adam", ("optimizer.schedule.eps=1e-3",)), grads)
    want = {}
    for name, x in grads.items():
        m, v, path = np.zeros(x.shape[1:]), np.zeros(x.shape[1:]), []
        for g in x.astype(np.float64):
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            path.append(-1e-4 * (1 + 1e-3) * m / (1e-3 + np.sqrt(v + 1e-10)))
        want[name] = np.stack(path)
    # The hyperparameters are kept as float32 logarithms: 1 - b2 is known to 1e-5.
    assert distance(got, want) < 1e-4


# --- a step along one feature -----------------------------------------------------------------------------


def along_momentum(g: np.ndarray, decay: float) -> np.ndarray:
    """Returns the averages ``[STEPS, *S]`` of gradients, not bias-corrected."""
    m, out, d = np.zeros(g.shape[1:]), [], float(np.float32(decay))
    for x in g:
        m = d * m + (1 - d) * x
        out.append(m)
    return np.stack(out)


def along_factored_gradient(g: np.ndarray, decay: float) -> np.ndarray:
    """Returns gradients preconditioned as Adafactor does, the second moment not bias-corrected (A1, A2).

    The formula is symmetric in rows and columns where no average is near its floor of 1e-9.
    """
    d, row, column, diagonal, out = float(np.float32(decay)), 0.0, 0.0, 0.0, []
    for x in g:
        if x.ndim < 2:
            diagonal = d * diagonal + (1 - d) * x**2
            out.append(x / np.sqrt(diagonal + 1e-9))
            continue
        row = d * row + (1 - d) * np.mean(x**2, 1, keepdims=True)
        column = d * column + (1 - d) * np.mean(x**2, 0, keepdims=True)
        out.append(x / np.sqrt(row / np.mean(row) * column))
    return np.stack(out)


def normalized_steps(
    grads: dict[str, np.ndarray], along: Any, rate: float, parameter_scale: bool
) -> dict[str, np.ndarray]:
    """Returns ``-rate x / sqrt(1e-5 + mean(x^2))`` for a feature x, or that times the parameter's RMS."""
    want = {}
    for name, p in drawn(0).items():
        p, path = p.astype(np.float64), []
        for x in along(grads[name].astype(np.float64)):
            scale = np.sqrt(np.mean(p**2) + 1e-9) if parameter_scale else 1.0
            path.append(-rate * scale * x / np.sqrt(1e-5 + np.mean(x**2)))
            p = p + path[-1]
        want[name] = np.stack(path)
    return want


RATE = "optimizer.schedule.value=0.05"  # so large that parameters, and what is made of them, change a lot
DECAYS = {name: (0.9, 0.99, 0.999) for name in ("celo", "velo_s", "adafac_mlp", "elo")}
DECAYS["rnn_mlp"] = (0.5, 0.9, 0.99, 0.999, 0.9999)


@pytest.mark.parametrize(
    ("preset", "channel", "overrides"),
    [
        ("celo", 0, ()),
        ("velo_s", 1, ()),
        ("velo_s", 0, ("optimizer.update_rule.bank_scale=100.0",)),
        ("adafac_mlp", 0, ()),
        ("elo", 2, ()),
        ("rnn_mlp", 0, ()),
        ("rnn_mlp", 3, ()),
    ],
)
def test_steps_along_momentum(preset: str, channel: int, overrides: tuple[str, ...]) -> None:
    """Every preset's default start: normalized momentum at a constant rate, whatever its LSTM sees."""
    opt = hand_made(preset, (RATE, *overrides), mix=(("momentum", channel, 1.0),))
    grads, decay = drawn(4, STEPS), DECAYS[preset][channel]
    scaled = preset in ("celo", "velo_s")
    want = normalized_steps(grads, lambda g: along_momentum(g, decay), 0.05, scaled)
    # Where a scalar's momentum passes 0, the normalization multiplies its rounding by 1 / sqrt(1e-5).
    assert distance(moved(opt, grads), want) < 5e-6


def test_steps_along_the_gradient() -> None:
    """Normalized gradient descent."""
    grads = drawn(5, STEPS)
    want = normalized_steps(grads, lambda g: g, 0.05, False)
    assert distance(moved(hand_made("adafac_mlp", (RATE,), mix=(("gradient", 0, 1.0),)), grads), want) < 1e-6


def test_steps_along_the_factored_gradient() -> None:
    """Adafactor without bias correction, then normalized."""
    grads = drawn(6, STEPS)
    want = normalized_steps(grads, lambda g: along_factored_gradient(g, 0.99), 0.05, False)
    opt = hand_made("elo", (RATE,), mix=(("factored_gradient", 1, 1.0),))
    assert distance(moved(opt, grads), want) < 2e-6


NESTEROV = (("momentum", 0, 0.9), ("gradient", 0, 0.1))


@pytest.mark.parametrize("preset", ["celo2_base", "celo_phase1"])
def test_a_mix_is_the_weighted_sum_of_its_features(preset: str) -> None:
    """Nesterov's momentum as a mix of two features that are not normalized, with one MLP and with a bank."""
    plain = [f"optimizer.{kind}.kind=identity" for kind in ("normalization", "output_normalization")]
    plain += ["optimizer.step.parameter_scale=False"] if preset == "celo_phase1" else []
    rate = "optimizer.schedule.value=0.5"
    opt = hand_made(preset, (*plain, rate), mix=NESTEROV)
    grads = drawn(7, STEPS)
    momentum, want = {k: np.zeros(s) for k, s in SHAPES.items()}, {k: [] for k in SHAPES}
    for step in range(STEPS):
        for name in SHAPES:
            g = grads[name][step].astype(np.float64)
            momentum[name] = 0.9 * momentum[name] + 0.1 * g
            want[name].append(-0.5 * (0.9 * momentum[name] + 0.1 * g))
    assert distance(moved(opt, grads), {k: np.stack(v) for k, v in want.items()}) < 2e-6


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ((("momentun", 0, 1.0),), "did you mean 'momentum'"),
        ((("momentum", 3, 1.0),), "plane of momentum in mix = 3 is out of range: must be 0 to 2"),
        ((("momentum", 0, "1"),), "weight of momentum in mix = '1' is out of range"),
        ((("momentum", 0),), "a tuple of (feature group, plane, weight)"),
        (("momentum", 0, 1.0), "a tuple of (feature group, plane, weight)"),
        (tuple(("momentum", 0, 1.0) for _ in range(5)), "at least 10 units a layer"),
    ],
)
def test_a_mix_that_cannot_be_made(mix: tuple, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        hand_made("celo2_base", mix=mix)
