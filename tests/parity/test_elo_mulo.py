"""ELO and muLO, of which there are no recordings: against the twin of the adafac MLP, tensor by tensor."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from celo_nnx.build import build
from celo_nnx.config import load
from celo_nnx.interfaces import Optimizer
from celo_nnx.naive_zoo.adafac_mlp import NaiveAdafacMLP

SHAPES = {"input": (5, 8), "hidden": (8, 6), "deep": (6, 7), "bias": (8,), "gain": ()}
STEPS = 4
RATE = 0.05


def drawn(seed: int, *lead: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(*lead, *shape)).astype(np.float32) for name, shape in SHAPES.items()}


def noisy(theta: Any) -> Any:
    """Returns a theta in which every leaf, biases and offsets too, differs from its start."""
    leaves, tree = jax.tree.flatten(theta)
    rng = np.random.default_rng(7)
    return tree.unflatten([x + 0.1 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])


def composed(preset: str, *overrides: str) -> Optimizer:
    return build(load(preset, [f"optimizer.{text}" for text in overrides]).optimizer)


def moved(rule: Optimizer, decay: float | None = None) -> dict[str, np.ndarray]:
    """Returns the updates ``[STEPS, *S]`` at parameters that follow a path of their own."""
    options = {} if decay is None else {"weight_decay": decay}

    def step(state: Any, fed: tuple) -> tuple:
        updates, state = rule.update(fed[0], state, fed[1], value=jnp.float32(1.0), **options)
        return state, updates

    start = jax.tree.map(lambda p: p[0], drawn(1, STEPS))
    fed = (drawn(2, STEPS), drawn(1, STEPS))
    run = jax.jit(lambda start: jax.lax.scan(step, rule.init(start, STEPS), fed))
    return jax.tree.map(np.asarray, run(start)[1])


def names(theta: Any) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(theta)]


def test_elo_has_no_learned_decays() -> None:
    """No ``offset`` in theta: after one gradient the averages are 1 - d of it, or of its square."""
    elo, adafac = composed("elo"), composed("adafac_mlp", "update_rule.hidden=(32,32)")
    offsets = [name for name in names(adafac.theta) if "offset" in name]
    assert len(offsets) == 3 and set(names(adafac.theta)) - set(names(elo.theta)) == set(offsets)
    params, grads = {"w": jnp.ones((3, 4))}, {"w": jnp.full((3, 4), 2.0)}
    (own,) = elo.update(grads, elo.init(params), params)[1]["learned"].values()
    averages = {name: own[name] for name in ("momentum", "second_moment")} | {"row": own["factored"]["row"]}
    decays = {"momentum": (0.9, 0.99, 0.999), "second_moment": (0.999,), "row": (0.9, 0.99, 0.999)}
    for name, average in averages.items():
        d, size = np.float32(decays[name]), 2.0 if name == "momentum" else 4.0
        assert_allclose(
            np.asarray(average).reshape(d.size, -1)[:, 0], (1 - d) * size, rtol=1e-6, err_msg=name
        )


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_elo_is_the_adafac_mlp_with_decoupled_decay(decay: float) -> None:
    """The whole update: ``-lr (a exp(u/1000) + wd p)``, the old p, a and u of the twin at offsets of 0."""
    elo = composed("elo", f"schedule.value={RATE}", f"weight_decay={decay}")
    theta = noisy(elo.theta)
    zeros = {"momentum": 3, "second_moment": 1, "factored": 3}
    offsets = {name: {"offset": np.zeros(k, np.float32)} for name, k in zeros.items()}
    want = moved(NaiveAdafacMLP(theta | {"accumulators": offsets}, step_mult=RATE))
    got, old = moved(elo.with_theta(theta)), drawn(1, STEPS)
    for name in SHAPES:
        size = np.max(np.abs(want[name]))
        assert_allclose(got[name], want[name] - RATE * decay * old[name], atol=1e-6 * size, err_msg=name)
        assert size > 1e-2 * RATE


MULTIPLIERS = {"input": 1.0, "hidden": 4.0, "deep": 3.0, "bias": 1.0, "gain": 1.0}
# A pattern that fits everything still leaves vectors and scalars alone, and comes after the others.
TABLE = "(('hidden', 4.0), ('deep', 3.0), ('input', 1.0), ('.', 5.0))"


@pytest.mark.parametrize("decay", [None, 0.3])
def test_mulo_divides_by_the_width_multiplier(decay: float | None) -> None:
    """The same theta with and without the part: each tensor's update, decay included, is divided."""
    plain = composed("mulo", f"schedule.value={RATE}")
    theta = noisy(plain.theta)
    scaled = composed("mulo", f"schedule.value={RATE}", f"rate_scale.multipliers={TABLE}")
    before, after = (moved(rule.with_theta(theta), decay) for rule in (plain, scaled))
    for name, multiplier in MULTIPLIERS.items():
        assert np.all(before[name] != 0)
        if multiplier == 1.0:
            assert_array_equal(after[name], before[name], err_msg=name)
        assert_allclose(before[name] / after[name], multiplier, rtol=1e-6, err_msg=name)


def test_mulo_is_the_adafac_mlp_otherwise() -> None:
    """Learned decays at offsets that are not 0, and the twin's updates over the multipliers."""
    mulo = composed("mulo", f"schedule.value={RATE}", f"rate_scale.multipliers={TABLE}")
    theta = noisy(mulo.theta)
    assert np.ptp(theta["accumulators"]["momentum"]["offset"]) > 1e-3
    got, want = moved(mulo.with_theta(theta)), moved(NaiveAdafacMLP(theta, step_mult=RATE))
    for name, multiplier in MULTIPLIERS.items():
        size = np.max(np.abs(want[name])) / multiplier
        assert_allclose(got[name], want[name] / multiplier, atol=1e-6 * size, err_msg=name)


@pytest.mark.parametrize(("size", "finite"), [(1.8e19, True), (1.9e19, False)])
def test_gradients_without_a_clip(size: float, finite: bool) -> None:
    """Nothing limits them, so one whose square is beyond float32 gives NaN, as the part's docstring says."""
    rule = composed("elo")
    params = {"w": jnp.ones((3, 4))}
    grads = {"w": jnp.ones((3, 4)).at[1, 2].set(size)}
    updates, _ = rule.update(grads, rule.init(params), params)
    assert bool(jnp.isfinite(updates["w"]).all()) == finite
    assert bool(jnp.isnan(updates["w"]).all()) != finite
