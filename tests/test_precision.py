"""bfloat16 accumulators: rounding that is right in expectation, and trajectories near the float32 ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from celo_nnx import UserError
from celo_nnx.config import load_optimizer
from celo_nnx.precision import Storage, bits, from_bits, mix

PARAMS = {
    "w": jnp.ones((24, 40)),
    "stack": jnp.ones((3, 20, 24)),
    "bias": jnp.ones(5),
    "tall": jnp.ones((30, 4)),
}


def grads(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=p.shape), jnp.float32) for k, p in PARAMS.items()}


def test_stochastic_rounding_is_unbiased_and_to_a_neighbour() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 48)), jnp.float32)
    storage = Storage("bfloat16")
    drawn = jnp.stack([storage.store(x, jnp.uint32(seed)).astype(jnp.float32) for seed in range(400)])
    gap = jnp.abs(x) * 2.0**-7  # one unit in the last place of bfloat16 is at most this
    assert bool((jnp.abs(drawn - x) <= gap).all())
    bias = (drawn.mean(0) - x) / gap
    # A mean of 400 draws, each off by at most one unit: standard deviation at most 0.5 / 20.
    assert float(jnp.abs(bias).max()) < 5 * 0.025 and abs(float(bias.mean())) < 3 * 0.025 / 55
    exact = x.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(storage.store(exact, jnp.uint32(7)).astype(jnp.float32), exact)


def test_rounding_of_a_tile_is_that_of_the_whole() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 12, 10)), jnp.float32)
    storage, seed = Storage("bfloat16"), mix(jnp.uint32(3), 4)
    whole = storage.store(x, seed)
    for start in (0, 4, 8):
        part = storage.store(x[..., start : start + 4, :], seed, start)
        np.testing.assert_array_equal(part, whole[..., start : start + 4, :])
    assert bool((whole[0] != storage.store(x[1], seed)).any())


def test_bits_are_the_state_in_another_dtype() -> None:
    """Loops hold bfloat16 as uint16: loading, storing and going back change nothing."""
    storage, like = Storage("bfloat16"), jnp.asarray([1.5, -2.0, jnp.inf], jnp.bfloat16)
    tree = {"a": like, "b": jnp.ones(2)}
    packed = bits(tree)
    assert packed["a"].dtype == jnp.uint16 and packed["b"] is tree["b"]
    jax.tree.map(np.testing.assert_array_equal, from_bits(packed, tree), tree)
    jax.tree.map(np.testing.assert_array_equal, storage.load(packed), storage.load(tree))
    new = {"a": jnp.array([1.001, 3.14159, 0.1]), "b": jnp.zeros(2)}
    kept = from_bits(storage.keep(new, packed, jnp.uint32(5)), tree)
    jax.tree.map(np.testing.assert_array_equal, kept, storage.keep(new, tree, jnp.uint32(5)))


def test_not_finite_values_and_the_largest_stay_what_they_are() -> None:
    x = jnp.array([jnp.inf, -jnp.inf, jnp.nan, jnp.finfo(jnp.float32).max, 0.0])
    out = Storage("bfloat16").store(x, jnp.uint32(1))
    assert out[0] == jnp.inf and out[1] == -jnp.inf and bool(jnp.isnan(out[2])) and out[4] == 0


@pytest.mark.parametrize("tile", [0, 100])
@pytest.mark.parametrize("variant", ["celo2", "celo2_base"])
def test_a_bfloat16_state_moves_as_a_float32_one_within_its_error(variant: str, tile: int) -> None:
    """Over 30 steps the error of a step, relative to its RMS of 1, stays near 2**-8."""
    full = load_optimizer(variant)
    half = load_optimizer(variant, ["optimizer.state.dtype=bfloat16", f"optimizer.tile={tile}"])
    a, b = full.init(PARAMS), half.init(PARAMS)
    step = jax.jit(lambda g, s: full.update(g, s, PARAMS, learning_rate=1.0))
    half_step = jax.jit(lambda g, s: half.update(g, s, PARAMS, learning_rate=1.0))
    for seed in range(30):
        (ua, a), (ub, b) = step(grads(seed), a), half_step(grads(seed), b)
    wanted = {"momentum": jnp.bfloat16, "second_moment": jnp.bfloat16}
    for entry in b["learned"].values():
        for name, dtype in wanted.items():
            assert entry[name].dtype == dtype
        assert {x.dtype for x in jax.tree.leaves(entry["factored"])} <= {
            jnp.dtype("float32"),
            jnp.dtype("bfloat16"),
        }
    if variant == "celo2":
        assert {x.dtype for x in jax.tree.leaves(b["routes"])} == {jnp.dtype("bfloat16")}
    for key in PARAMS:
        scale = float(jnp.sqrt(jnp.mean(ua[key] ** 2)))
        error = float(jnp.sqrt(jnp.mean((ua[key] - ub[key]) ** 2))) / scale
        assert 0 < error < 0.03, (key, error)


def test_a_momentum_reaches_a_constant_gradient_only_with_stochastic_rounding() -> None:
    """Decay 0.999: each increment is below half a unit of bfloat16 once the average is near."""
    ends = {}
    for rounding in ("nearest", "stochastic"):
        storage = Storage("bfloat16", rounding)

        def step(m, t, storage=storage):
            new = storage.load(m) * 0.999 + 0.001
            return storage.store(new, mix(jnp.uint32(0), t)), None

        m, _ = jax.lax.scan(step, jnp.zeros((4, 64), jnp.bfloat16), jnp.arange(6000))
        ends[rounding] = float(m.astype(jnp.float32).mean())
    assert ends["nearest"] < 0.8 and abs(ends["stochastic"] - 1) < 0.02


def test_a_rounded_run_repeats_and_other_dtypes_are_refused() -> None:
    half = load_optimizer("celo2_base", ["optimizer.state.dtype=bfloat16"])
    update = jax.jit(half.update)
    first, second = (update(grads(0), half.init(PARAMS), PARAMS)[1] for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    with pytest.raises(UserError, match="float16"):
        load_optimizer("celo2", ["optimizer.state.dtype=float16"])
    with pytest.raises(UserError, match="rounding"):
        load_optimizer("celo2", ["optimizer.state.rounding=up"])
