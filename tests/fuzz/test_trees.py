"""Parameter trees of odd shapes and names: an optimizer updates them, or refuses them in one line."""

from __future__ import annotations

import functools
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fuzzing import Tally, examples
from hypothesis import given
from hypothesis import strategies as st

import celo_nnx

NAMES = (
    "w",
    "kernel",
    "bias",
    "b",
    "",
    " ",
    "/",
    "a/b",
    ".value",
    "embedding",
    "scale",
    "é",
    "\n",
    "0",
    "w" * 500,
)
SIZES = st.sampled_from((0, 1, 1, 2, 3, 5, 17))
VARIANTS = ("celo2", "celo2_base", "celo", "velo_s", "nn_adam")
leaves = st.builds(
    lambda shape, dtype: (tuple(shape), dtype),
    st.lists(SIZES, max_size=5),
    st.sampled_from(("float32",) * 6 + ("bfloat16", "float16", "int32", "bool", "complex64")),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
        st.lists(inner, max_size=3),
        st.dictionaries(st.integers(0, 3), inner, max_size=2),
    ),
    max_leaves=6,
)


@functools.cache
def optimizer(name: str) -> Any:
    return celo_nnx.load_optimizer(name, weights="hand_made" if name in ("celo2", "celo2_base") else None)


def filled(tree: Any, number: float) -> Any:
    leaf = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda x: jnp.full(x[0], number).astype(x[1]), tree, is_leaf=leaf)


def update(tx: Any, params: Any, grads: Any) -> Any:
    state = tx.init(params)
    return tx.update(grads, state, params, value=jnp.float32(1.0))[0]


@examples(12, 400)
@given(tree=trees, name=st.sampled_from(VARIANTS))
def test_any_tree(tally: Tally, tree: Any, name: str) -> None:
    params, grads = filled(tree, 0.5), filled(tree, -1.0)
    with tally.trying():
        tx = optimizer(name).as_optax(num_steps=10)
        updates = jax.eval_shape(functools.partial(update, tx), params, grads)
        same = jax.tree.map(lambda u, p: u.shape == p.shape, updates, params)
        assert all(jax.tree.leaves(same)) and jax.tree.structure(updates) == jax.tree.structure(params)


@pytest.mark.parametrize("name", ("celo2", "celo"))
def test_every_rank_and_the_empty_tensor_step(name: str) -> None:
    shapes = (
        (),
        (0,),
        (1,),
        (3,),
        (0, 3),
        (1, 1),
        (3, 2),
        (2, 0, 3),
        (2, 1, 3),
        (1, 1, 1, 1),
        (2, 1, 2, 1, 3),
    )
    params = {f"w{i}": jnp.full(shape, 0.5) for i, shape in enumerate(shapes)}
    updates = jax.jit(functools.partial(update, optimizer(name).as_optax(num_steps=10)))(params, params)
    for key, x in params.items():
        assert updates[key].shape == x.shape and np.isfinite(updates[key]).all(), key
        assert x.size == 0 or np.any(updates[key] != 0), key


@pytest.mark.drill
def test_ten_thousand_leaves() -> None:
    params = {f"layer{i}": {"kernel": jnp.full((4, 3), 0.5), "bias": jnp.full(3, 0.5)} for i in range(5000)}
    step = jax.jit(functools.partial(update, optimizer("celo2").as_optax(num_steps=10)))
    begin = time.monotonic()
    lowered = step.lower(params, params)
    traced = time.monotonic()
    compiled = lowered.compile()
    made = time.monotonic()
    updates = jax.block_until_ready(compiled(params, params))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))
    seconds = {"trace": traced - begin, "compile": made - traced, "step": time.monotonic() - made}
    print(json.dumps({"leaves": 10_000} | {k: round(v, 2) for k, v in seconds.items()}))
