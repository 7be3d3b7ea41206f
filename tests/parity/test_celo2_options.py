"""Options of Celo2-base that no recorded file exercises: against the plain twin, and written out by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from celo_nnx.build import build
from celo_nnx.config import load
from celo_nnx.interfaces import Optimizer, PyTree
from celo_nnx.naive import NaiveCelo2, Switches
from celo_nnx.optimizer import LearnedOptimizer

SHAPES = {"matrix": (6, 9), "stack": (2, 5, 3), "vector": (5,)}
STEPS = 5
CORRECTED = tuple(
    f"accumulators.{name}.bias_correction=True" for name in ("momentum", "second_moment", "factored")
)
SWITCHES = {
    "bias_correction": CORRECTED,
    "precondition_output": ("step.precondition=True",),
    "param_scale_mult": ("step.parameter_scale=True",),
    "aggregate_mag": ("step.aggregate_magnitude=True",),
}


def drawn(seed: int, *lead: int, size: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    out = {name: size * rng.normal(size=(*lead, *shape)) for name, shape in SHAPES.items()}
    return {name: x.astype(np.float32) for name, x in out.items()}


def noisy(theta: PyTree) -> PyTree:
    leaves, tree = jax.tree.flatten(theta)
    rng = np.random.default_rng(7)
    return tree.unflatten([x + 0.1 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])


def composed(*overrides: str, **theta_init: object) -> LearnedOptimizer:
    """Returns Celo2-base at the learning rate 1, with tensors looked at as the twin does."""
    fixed = ("schedule.value=1.0", "tensors.axes=last_two")
    config = load("celo2_base", [f"optimizer.{text}" for text in (*fixed, *overrides)])
    return build(config.optimizer, theta_init=theta_init or None)


def moved(rule: Optimizer, size: float = 1.0, grads: float = 1e-2) -> tuple[dict[str, np.ndarray], PyTree]:
    """Returns the updates ``[STEPS, *S]`` at parameters with a path of their own, and the last state."""

    def step(state: PyTree, fed: tuple) -> tuple:
        updates, state = rule.update(fed[0], state, fed[1], value=jnp.float32(0.0))
        return state, updates

    params = drawn(1, STEPS, size=size)
    start, fed = {name: p[0] for name, p in params.items()}, (drawn(2, STEPS, size=grads), params)
    run = jax.jit(lambda start: jax.lax.scan(step, rule.init(start, STEPS), fed))
    state, updates = run(start)
    return jax.tree.map(np.asarray, updates), state


def gap(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Returns the largest difference, relative to the largest update of its tensor."""
    return max(float(np.max(np.abs(a[name] - b[name])) / np.max(np.abs(b[name]))) for name in SHAPES)


@pytest.fixture(scope="module")
def plain() -> tuple[dict[str, np.ndarray], PyTree]:
    """The path without any option, at exp_mult 0.5 and with raw outputs, which options can change."""
    rule = composed("step.exp_mult=0.5", "output_normalization.kind=identity")
    return moved(rule.with_theta(noisy(rule.theta)))


@pytest.mark.parametrize("name", SWITCHES)
def test_option_against_the_twin(name: str, plain: tuple) -> None:
    """Each has its effect, and it is the twin's; tensors of rank 1 to 3."""
    rule = composed("step.exp_mult=0.5", "output_normalization.kind=identity", *SWITCHES[name])
    theta = noisy(rule.theta)
    switches = Switches(exp_mult=0.5, normalize_output=False, **{name: True})
    twin = NaiveCelo2(theta, orthogonalize=False, learning_rate=1.0, switches=switches)
    got, state = moved(rule.with_theta(theta))
    assert gap(got, moved(twin)[0]) < 2e-5
    assert all(np.max(np.abs(got[n] - plain[0][n])) > 1e-2 * np.max(np.abs(plain[0][n])) for n in SHAPES)
    # What is kept is the same under every option: bias correction is of readings alone.
    jax.tree.map(assert_array_equal, state["learned"], plain[1]["learned"])


def test_precondition_comes_last_and_reads_corrected_averages() -> None:
    """``y / sqrt(v + 1e-6)`` after output normalization, v without its start at zero if asked for."""
    plain, changed = (composed(*CORRECTED, *more) for more in ((), ("step.precondition=True",)))
    theta = noisy(plain.theta)
    before, after = (moved(rule.with_theta(theta))[0] for rule in (plain, changed))
    for name, grads in drawn(2, STEPS, size=1e-2).items():
        v, d = np.zeros(SHAPES[name]), float(np.float32(0.95))
        for i, g in enumerate(grads.astype(np.float64)):
            v = d * v + (1 - d) * g**2
            want = before[name][i] / np.sqrt(v / (1 - d ** (i + 1)) + 1e-6)
            assert_allclose(after[name][i], want, rtol=2e-5, err_msg=f"{name} {i}")


@pytest.mark.parametrize("feature", ["factored_gradient", "factored_momentum"])
def test_bias_correction_of_factors(feature: str) -> None:
    """Not of the gradient's; of momentum's ``m R C``, where ``1 / (1 - d^t)`` meets its root in ``C``."""
    raw = ("normalization.kind=identity", "output_normalization.kind=identity")
    start = {"kind": "hand_made", "mix": ((feature, 0, 1.0),)}
    before, after = (moved(composed(*raw, *more, **start), grads=1.0)[0] for more in ((), CORRECTED))
    power = float(np.float32(0.9)) ** np.arange(1, STEPS + 1)
    for name in ("matrix", "stack"):
        gain = np.ones(STEPS) if feature == "factored_gradient" else 1 / np.sqrt(1 - power)
        want = before[name] * gain.reshape(-1, *(1,) * len(SHAPES[name]))
        assert np.all(before[name] != 0)
        assert_allclose(after[name], want, rtol=2e-6, err_msg=name)
    assert_array_equal(after["vector"], before["vector"])


@pytest.mark.parametrize(("limit", "size"), [(0.0, 3.0), (0.2, 3.0), (0.2, 0.1)])
def test_scale_limit(limit: float, size: float) -> None:
    """The step is times ``min(rho, limit sqrt(N))``; 0 is no limit. The twin has no such option here."""
    scale = ("step.parameter_scale=True", f"step.scale_limit={limit}")
    start = {"kind": "hand_made", "mix": (("gradient", 0, 1.0),)}
    rule = composed("output_normalization.kind=identity", "normalization.axes=all", *scale, **start)
    got, _ = moved(rule, size)
    limited = []
    for name, grads in drawn(2, STEPS, size=1e-2).items():
        params = drawn(1, STEPS, size=size)[name].astype(np.float64)
        for i, g in enumerate(grads.astype(np.float64)):
            rho = np.sqrt(np.mean(params[i] ** 2) + 1e-9)
            most = limit * np.sqrt(g.size) if limit else np.inf
            limited.append(bool(rho > most))
            want = -min(rho, most) * g / np.sqrt(1e-9 + np.mean(g**2))
            assert_allclose(got[name][i], want, rtol=2e-6, atol=1e-7, err_msg=f"{name} {i}")
    assert set(limited) == {limit > 0 and size > 1}
