"""The kernel in tiles and in stacks against the plain twin, in mixed precision, and what memory it takes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from celo_nnx.build import build
from celo_nnx.config import load, load_optimizer
from celo_nnx.kernel import tile_rows
from celo_nnx.naive import Switches, from_config

# Ranks 0 to 5. Tensors of one shape are stacked; a last axis below 16 is flipped with the one before it.
SHAPES = {
    "scalar": (),
    "vector": (5,),
    "row": (1, 24),
    "wide": (7, 20),
    "wide2": (7, 20),
    "tall": (40, 3),
    "tall2": (40, 3),
    "stack": (2, 10, 18),
    "deep": (2, 1, 5, 24),
    "five": (1, 2, 2, 6, 16),
}
STEPS = 3
QUICK = {"xla_backend_optimization_level": 0}  # compiles in two thirds of the time, the program is the same
# A narrower rule for what is not about its width: 22 planes and one hidden layer.
SMALL = (
    "optimizer.update_rule.hidden=(3,)",
    "optimizer.accumulators.momentum.decays=(0.9,0.99)",
    "optimizer.accumulators.factored.decays=(0.9,0.99)",
)


def random_tree(seed: int, keys: Any = SHAPES, steps: tuple[int, ...] = ()) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    tree = {k: rng.normal(size=(*steps, *SHAPES[k])) * 10.0 ** rng.integers(-3, 2) for k in keys}
    return {k: jnp.asarray(x, jnp.float32) for k, x in tree.items()}


def config_of(name: str, *overrides: str) -> dict[str, Any]:
    config = load(name, overrides).optimizer.to_dict()
    config |= {"weight_decay": 0.1, "schedule": {"kind": "constant", "value": 1.0}}
    config["tensors"] |= {"axes": "last_two"}
    return config


def theta_of(like: Any, seed: int) -> Any:
    leaves, tree = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return tree.unflatten(noisy)


def trajectory(rule: Any, theta: Any, params: Any, grads: Any) -> tuple[Any, Any]:
    """Returns (all updates of a few steps under scan, last state)."""
    rule = rule.with_theta(theta)

    def step(carry: Any, g: Any) -> Any:
        params, state = carry
        updates, state = rule.update(g, state, params, value=jnp.zeros(()))
        return (jax.tree.map(jnp.add, params, updates), state), updates

    (_, state), updates = jax.lax.scan(step, (params, rule.init(params, STEPS)), grads)
    return updates, state


def compare(got: Any, want: Any, tolerance: float = 1e-4) -> None:
    for key in want:
        assert bool(jnp.isfinite(got[key]).all()), key
        np.testing.assert_allclose(got[key], want[key], rtol=tolerance, atol=tolerance, err_msg=key)


def both(composed: Any, twin: Any, *arguments: Any) -> None:
    """Compares all updates of two rules."""
    run = lambda rule: jax.jit(lambda: trajectory(rule, *arguments)[0], compiler_options=QUICK)()  # noqa: E731
    compare(run(composed), run(twin))


@pytest.mark.parametrize(
    "name,tile,keys",
    [
        ("celo2_base", 80, tuple(SHAPES)),  # 2 to 4 rows and a rest
        ("celo2_base", 20, ("wide", "wide2", "tall")),  # one row
        ("celo2", 80, ("wide", "wide2", "stack", "vector")),
    ],
)
def test_tiles_follow_the_twin(name: str, tile: int, keys: tuple[str, ...]) -> None:
    """Two thetas under vmap, steps of RMS 1 under scan: no error but rounding."""
    config = config_of(name, f"optimizer.tile={tile}", *SMALL)
    composed, twin = build(config), from_config(ConfigDict(config))
    sizes = {k: tile_rows(s.shape, tile) for k, s in composed.specs(random_tree(0, keys)).items()}
    assert all(sizes[k] for k in keys if k not in ("scalar", "vector", "row")), sizes
    thetas = jax.tree.map(lambda *x: jnp.stack(x), *[theta_of(composed.theta, seed) for seed in range(2)])
    params, grads = random_tree(1, keys), random_tree(2, keys, (STEPS,))

    def run(rule: Any) -> Any:
        over_thetas = jax.vmap(lambda theta: trajectory(rule, theta, params, grads)[0])
        return jax.jit(over_thetas, compiler_options=QUICK)(thetas)

    compare(run(composed), run(twin))


def test_heads_in_tiles_follow_the_twin() -> None:
    """The magnitude output and the parameter's RMS, without the output normalization that hides a factor."""
    config = config_of(
        "celo2_base",
        "optimizer.tile=80",
        *SMALL,
        "optimizer.output_normalization.kind=identity",
        "optimizer.step.exp_mult=0.3",
        "optimizer.step.parameter_scale=true",
    )
    switches = Switches(exp_mult=0.3, param_scale_mult=True, normalize_output=False)
    twin = dataclasses.replace(from_config(ConfigDict(config)), switches=switches)
    keys, composed = ("wide", "tall", "tall2"), build(config)
    theta = theta_of(composed.theta, 3)
    both(composed, twin, theta, random_tree(4, keys), random_tree(5, keys, (STEPS,)))


CONTEXT = {
    "size": {"kind": "log_statistic", "of": "gradient", "statistic": "norm"},
    "drift": {"kind": "sign_of_mean", "of": "momentum"},
}


@pytest.mark.parametrize(
    "axes,keys", [("rows", ("tall", "stack")), ("columns", ("tall",)), ("all", ("stack",))]
)
def test_every_normalization_in_tiles_is_that_of_the_whole(axes: str, keys: tuple[str, ...]) -> None:
    """And context that looks at the tensor sees all of it."""
    rules = []
    for tile in (80, 10**6):
        overrides = (f"optimizer.tile={tile}", *SMALL, f"optimizer.normalization.axes={axes}")
        rules.append(
            build(config_of("celo2_base", *overrides) | ({"context": CONTEXT} if axes == "all" else {}))
        )
    theta = theta_of(rules[0].theta, 8)
    both(*rules, theta, random_tree(6, keys), random_tree(7, keys, (2,)))


def test_half_precision_gradients_and_parameters_follow_the_twin() -> None:
    """Tensors of one shape and several dtypes; the arithmetic is that of float32 on the same numbers."""
    config = config_of("celo2_base", "optimizer.tile=80", *SMALL)
    dtypes = {"wide": "bfloat16", "wide2": "float16", "tall": "float32", "tall2": "bfloat16"}
    other = {"float32": "bfloat16", "float16": "float32", "bfloat16": "bfloat16"}  # of the gradient
    composed, twin = build(config), from_config(ConfigDict(config))
    theta = theta_of(composed.theta, 9)
    params = {k: x.astype(dtypes[k]) for k, x in random_tree(10, dtypes).items()}
    grads = {k: x.astype(other[dtypes[k]]) for k, x in random_tree(11, dtypes, (STEPS,)).items()}

    def run(rule: Any, params: Any, grads: Any) -> Any:
        rule = rule.with_theta(theta)

        def step(state: Any, g: Any) -> Any:
            updates, state = rule.update(g, state, params, value=jnp.zeros(()))
            return state, updates

        return jax.lax.scan(step, rule.init(params, STEPS), grads)

    full = jax.tree.map(lambda x: x.astype(jnp.float32), (params, grads))
    both = jax.jit(lambda: (run(composed, params, grads), run(twin, *full)), compiler_options=QUICK)
    (state, got), (twins, want) = both()
    for key, dtype in dtypes.items():
        assert got[key].dtype == dtype
        half_unit = 0 if dtype == "float32" else float(jnp.finfo(dtype).eps) / 2
        np.testing.assert_allclose(
            got[key].astype(jnp.float32), want[key], rtol=1.01 * half_unit + 1e-5, atol=1e-4, err_msg=key
        )
    moments = {k: t["m"] for k, t in zip(sorted(dtypes), twins["tensors"], strict=True)}
    kept = state["learned"]["7x20"]["momentum"]
    for i, key in enumerate(("wide", "wide2")):
        np.testing.assert_allclose(jnp.moveaxis(kept[i], 0, -1), moments[key], rtol=1e-5, atol=1e-9)


# --- tiles and memory -------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 5000), min_size=0, max_size=4).map(tuple), st.integers(0, 10**7))
def test_tile_rows(shape: tuple[int, ...], limit: int) -> None:
    size, total = tile_rows(shape, limit), int(np.prod(shape, dtype=np.int64))
    if limit == 0 or len(shape) < 2 or total <= limit:
        assert size == 0
        return
    full = shape[-2]
    assert (size == 0 and full == 1) or 1 <= size < full
    row = total // full
    if size:
        assert size == 1 or size * row <= limit
        # Not much smaller than it might be, and a rest only where no divisor is near.
        assert 2 * size * row > min(limit, total) - row or size == 1
        if full % size:
            assert (size + 1) * row > limit


def temporaries(params: dict[str, Any], *overrides: str) -> float:
    """Bytes of temporaries a parameter, of a compiled update with its state donated; nothing is run."""
    rule = load_optimizer("celo2_base", overrides)
    state = jax.eval_shape(rule.init, params)
    update = jax.jit(lambda g, s, p: rule.update(g, s, p), donate_argnums=1)
    memory = update.lower(params, state, params).compile(QUICK).memory_analysis()
    count = sum(x.size for x in params.values())
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes >= held, "the state is updated in place"
    return memory.temp_size_in_bytes / count


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="tile sizes and figures are a CPU's")
def test_nothing_of_features_times_parameters_is_in_memory() -> None:
    """30 planes would be 120 bytes a parameter; the step itself is 4."""
    full, half, tile = jnp.float32, jnp.bfloat16, "optimizer.tile=16384"

    def tensors(dtype: Any, *shapes: tuple[int, ...]) -> dict[str, Any]:
        return {f"w{i}": jax.ShapeDtypeStruct(shape, dtype) for i, shape in enumerate(shapes)}

    assert temporaries(tensors(full, (512, 512)), tile) < 8
    assert temporaries(tensors(full, *[(256, 256)] * 4), tile, "optimizer.normalization.axes=rows") < 8
    # XLA's CPU compiler would keep whole bfloat16 arrays in float32, and make them anew for every tile.
    assert temporaries(tensors(half, (512, 512)), tile, "optimizer.state.dtype=bfloat16") < 17
    # What has too few rows for tiles.
    assert temporaries(tensors(full, (1 << 18,))) < 40
    assert temporaries(tensors(full, (4, 1 << 16)), tile) < 24
