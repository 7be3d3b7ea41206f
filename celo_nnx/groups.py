"""Tensors of one shape: one compiled update for all of them, their state stacked.

Gradients and parameters are fetched by a switch, not stacked: a stack would take as much memory as both of
them. The stacked state and steps are updated in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from celo_nnx.interfaces import TensorSpec
from celo_nnx.kernel import TensorKernel, tile_rows
from celo_nnx.pallas_kernel import PallasKernel
from celo_nnx.precision import bits, from_bits, to_float32

Array = jax.Array
PyTree = Any
Pairs = Sequence[tuple[Array, Array]]  # (gradient, parameter) of each tensor, of its own shape and dtype

CPU_TILE = 1 << 18  # elements: large enough for both cores, small enough for the cache; measured


def stacked(tree: PyTree, count: int) -> PyTree:
    """Returns the state of ``count`` tensors: repeated on a new leading axis, as it is for one."""
    return tree if count == 1 else jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), tree)


def update_group(
    kernel: TensorKernel, spec: TensorSpec, pairs: Pairs, state: PyTree, number: int, tile: int
) -> tuple[list[Array], PyTree, Array]:
    """Updates the tensors of one shape one after the other.

    Args:
      kernel: the parts.
      spec: the description of each of them.
      pairs: their gradients and parameters.
      state: as :func:`stacked` made it.
      number: of the first tensor among the learned ones.
      tile: elements at most in a tile of a large tensor; 0 decides by the device.

    Returns:
      (steps in the tensors' own shapes, next state, the update rule's feedback ``[tensors, k]``).
    """
    limit = tile or (CPU_TILE if jax.default_backend() == "cpu" else 0)
    in_blocks = isinstance(kernel, PallasKernel) and kernel.serves(spec)
    rows = tile_rows(spec.shape, limit) if kernel.step.tiled and not in_blocks else 0
    update = functools.partial(kernel.blocks, limit=tile) if in_blocks else kernel.whole
    if len(pairs) == 1 and not rows:
        grad, param = (spec.enter(x) if in_blocks else spec.enter(x).astype(jnp.float32) for x in pairs[0])
        step, state, feedback = update(spec, grad, param, state, number)
        return [spec.leave(step)], state, feedback[None]
    one = len(pairs) == 1
    packed = bits(jax.tree.map(lambda x: x[None], state) if one else state)
    packed_pairs = [bits(pair) for pair in pairs]
    if rows:
        steps, new, feedback = _in_tiles(kernel, spec, packed_pairs, packed, number, rows)
    else:

        def packed_update(
            grad: Array, param: Array, own: PyTree, number: Array
        ) -> tuple[Array, PyTree, Array]:
            step, new, back = update(spec, grad, param, from_bits(own, state), number)
            return step, bits(new), back

        steps, new, feedback = _whole(packed_update, spec, packed_pairs, packed, number)
    new = jax.tree.map(lambda x: x[0], new) if one else new
    return [spec.leave(step) for step in steps], from_bits(new, state), feedback


def _whole(
    update: Callable[..., Any], spec: TensorSpec, pairs: Pairs, state: PyTree, number: int
) -> tuple[list[Array], PyTree, Array]:
    """Updates several tensors, each in one piece."""

    def body(carry: tuple[PyTree, Array], i: Array) -> tuple[tuple[PyTree, Array], Array]:
        state, steps = carry
        grad, param = _switch(i, pairs, lambda x: to_float32(spec.enter(x)))
        own = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), state)
        step, new, feedback = update(grad, param, own, number + i)
        put = lambda x, y: lax.dynamic_update_index_in_dim(x, y, i, 0)  # noqa: E731
        return (jax.tree.map(put, state, new), put(steps, step)), feedback

    steps = jnp.zeros((len(pairs), *spec.shape), jnp.float32)
    (state, steps), feedback = lax.scan(body, (state, steps), jnp.arange(len(pairs), dtype=jnp.int32))
    return list(steps), state, feedback


def rows_of_group(
    spec: TensorSpec, pairs: Pairs, state: PyTree, row: Callable[[Array, Array, PyTree, Array], Array]
) -> Array:
    """Returns ``row(grad, param, state, index)`` of the tensors of one shape, ``[tensors, width]``."""
    if len(pairs) == 1:
        return row(*(spec.enter(x).astype(jnp.float32) for x in pairs[0]), state, jnp.int32(0))[None]

    def body(_: None, i: Array) -> tuple[None, Array]:
        both = _switch(i, pairs, lambda x: spec.enter(x).astype(jnp.float32))
        own = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), state)
        return None, row(*both, own, i)

    return lax.scan(body, None, jnp.arange(len(pairs), dtype=jnp.int32))[1]


def _in_tiles(
    kernel: TensorKernel, spec: TensorSpec, pairs: Pairs, state: PyTree, number: int, size: int
) -> tuple[list[Array], PyTree, Array]:
    """Updates large tensors, each in tiles of ``size`` rows; ``state`` is stacked for one tensor too."""

    def body(carry: tuple[PyTree, Array], i: Array) -> tuple[tuple[PyTree, Array], Any]:
        # Axes that move are moved once, not in every tile.
        chosen = [_switch(i, _alike(pairs), spec.enter)] if spec.order else pairs
        which = jnp.int32(0) if spec.order else i

        def fetch(start: Array | int, rows: int) -> tuple[Array, Array]:
            def cut(x: Array) -> Array:
                return lax.dynamic_slice_in_dim(x.reshape(spec.shape), start, rows, len(spec.shape) - 2)

            return _switch(which, chosen, lambda x: to_float32(cut(x)))

        def param() -> Array:
            return to_float32(_switch(which, _alike(chosen))[1])

        state, steps, *more = kernel.tiled(spec, fetch, param, *carry, i, number + i, size)
        return (state, steps), more

    carry = (state, jnp.zeros((len(pairs), *spec.shape), jnp.float32))
    if len(pairs) == 1:
        (state, steps), (scale, feedback) = body(carry, jnp.int32(0))
        return [steps[0] * scale], state, feedback[None]
    (state, steps), (scales, feedback) = lax.scan(body, carry, jnp.arange(len(pairs), dtype=jnp.int32))
    return [steps[i] * scales[i] for i in range(len(pairs))], state, feedback


def _alike(pairs: Pairs) -> Pairs:
    """Returns the pairs as they are where they have the same dtypes, else in float32."""
    if len({(g.dtype, p.dtype) for g, p in pairs}) == 1:
        return pairs
    return [(to_float32(g), to_float32(p)) for g, p in pairs]


def _switch(
    index: Array, pairs: Pairs, function: Callable[[Array], Array] = lambda x: x
) -> tuple[Array, Array]:
    """Returns ``function`` of both arrays of the pair with that index; only that pair is read."""
    branches = [lambda g=g, p=p: (function(g), function(p)) for g, p in pairs]
    return branches[0]() if len(pairs) == 1 else lax.switch(index, branches)
