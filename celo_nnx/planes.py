"""Arithmetic on planes that XLA compiles well: block sums, fences, sums by shape.

A plane broadcasts to its tensor's shape (see :mod:`celo_nnx.interfaces`). Nothing here knows a part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
PyTree = Any

BLOCKS = 4  # row blocks added elementwise before squares are reduced; see block_mean_squares
STACKED = 1 << 12  # elements at most of planes that are stacked there


def rsqrt_floored(x: Array) -> Array:
    """Returns ``1 / sqrt(max(x, 1e-9))`` (srs of OPTIMIZERS section 0)."""
    return lax.rsqrt(jnp.maximum(x, 1e-9))


def fence(function: Callable[..., PyTree], like: PyTree, *args: PyTree) -> PyTree:
    """Evaluates ``function(*args)``, a tree like ``like``, so that XLA's CPU compiler computes it once.

    Its fusion pass copies a cheap producer into each consumer, and a whole unrolled MLP counts as cheap:
    a sum of squares and the step that follows would evaluate it twice. A conditional is never fused
    through; the predicate is a runtime one, so it is not simplified away. Other backends fuse less
    eagerly and would pay for the branch, so the call is plain there.
    """
    if jax.default_backend() != "cpu":
        return function(*args)
    taken = lax.optimization_barrier(jnp.bool_(True))
    zeros = lambda *_: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)  # noqa: E731
    return lax.cond(taken, function, zeros, *args)


def rows(tree: PyTree, rank: int, start: Array | int, size: int, full: int) -> PyTree:
    """Slices rows ``start .. start+size-1`` (axis -2) of every array that has all ``full`` of them.

    Planes with size 1 on that axis, and leading bank axes, pass through.
    """

    def cut(x: Array) -> Array:
        if x.ndim < 2 or x.ndim < rank or x.shape[-2] != full or full == 1:
            return x
        if isinstance(start, int):
            return lax.slice_in_dim(x, start, start + size, axis=x.ndim - 2)
        return lax.dynamic_slice_in_dim(x, start, size, axis=x.ndim - 2)

    return jax.tree.map(cut, tree)


def _halve(x: Array) -> Array:
    """Sums over axis -2 elementwise, by halves and a few last rows one by one; keeps the axis."""
    while x.shape[-2] > 1 and x.shape[-2] % 2 == 0:
        half = x.shape[-2] // 2
        x = x[..., :half, :] + x[..., half:, :]
    count = x.shape[-2]
    if count > 16:
        return jnp.sum(x, -2, keepdims=True)
    return sum((x[..., i : i + 1, :] for i in range(1, count)), x[..., :1, :])


def block_mean_squares(
    function: Callable[[PyTree], Sequence[Array]], tree: PyTree, shape: tuple[int, ...], axes: tuple[int, ...]
) -> Array:
    """Mean squares of planes that are made elementwise from ``tree``, without writing a plane to memory.

    Reducing a plane with ``jnp.sum`` makes XLA write it first. Where the axes are the last two, the rows
    are cut into blocks instead and the squares of the blocks added elementwise, one vector loop a plane;
    only one block's size is left to reduce (2.5 times faster, 18 planes on a CPU). Elsewhere small planes are
    stacked, which saves operations, and large ones reduced one after the other, which saves memory.

    Args:
      function: makes the planes, each of ``shape`` when given all of ``tree`` (or fewer rows of both).
      tree: arrays whose last axes broadcast to ``shape``.
      shape: the tensor's shape.
      axes: normalized, sorted, non-negative axes of the mean.

    Returns:
      ``[planes, *shape with 1 on axes]``.
    """
    rank = len(shape)
    kept = tuple(1 if a in axes else n for a, n in enumerate(shape))
    planes = function(tree)
    small = math.prod(shape) <= STACKED
    matrix = rank >= 2 and tuple(axes) == (rank - 2, rank - 1) and (small or shape[-2] >= BLOCKS)
    big = [j for j, x in enumerate(planes) if matrix and x.shape[-2:] == shape[-2:]]
    rest = [j for j in range(len(planes)) if j not in big]
    squares: dict[int, Array] = {}
    for size in {planes[j].shape for j in rest}:
        like = [j for j in rest if planes[j].shape == size]
        if math.prod(size) > STACKED:
            means = [jnp.mean(planes[j] * planes[j], axes, keepdims=True) for j in like]
        else:
            stack = jnp.stack([planes[j] for j in like])
            means = jnp.mean(stack * stack, tuple(a + 1 for a in axes), keepdims=True)
        squares.update(zip(like, means, strict=True))
    if big:
        sums = jnp.sum(row_sums(function, tree, shape, big), -1, keepdims=True)
        squares.update(zip(big, sums / (shape[-2] * shape[-1]), strict=True))
    return jnp.stack([jnp.broadcast_to(squares[j], kept) for j in range(len(planes))])


def row_sums(
    function: Callable[[PyTree], Sequence[Array]], tree: PyTree, shape: tuple[int, ...], chosen: Sequence[int]
) -> Array:
    """Sums the squares of the chosen planes over rows, by blocks of rows that are added elementwise.

    Args:
      function, tree, shape: as in :func:`block_mean_squares`, of rank 2 or more.
      chosen: which planes.

    Returns:
      ``[chosen, *shape with 1 on axis -2]``.
    """
    full = shape[-2]
    count = next(b for b in range(min(BLOCKS, full), 0, -1) if full % b == 0)
    size = full // count
    total: list[Array] = []
    for block in range(count):
        made = function(rows(tree, len(shape), block * size, size, full))
        squares = [made[j] * made[j] for j in chosen]
        total = [a + b for a, b in zip(total, squares, strict=True)] if total else squares
    kept = (*shape[:-2], 1, shape[-1])
    return jnp.stack([jnp.broadcast_to(_halve(x), kept) for x in total])


def weighted_sum(planes: Sequence[Array], weights: Array, bias: Array, shape: tuple[int, ...]) -> list[Array]:
    """First layer of an MLP over planes: ``out[h] = sum_j planes[j] * weights[j, h] + bias[h]``.

    Planes smaller than the tensor (row and column factors) are summed among themselves, a vector for
    each hidden unit, and join by broadcast: 12 of Celo2's 30 planes cost nothing per element.

    Args:
      planes: ``C`` arrays that broadcast to ``shape``.
      weights: ``[C, H, *b]``, ``b`` broadcasting to ``shape`` (a scale for each batch slice).
      bias: ``[H]``.
      shape: the tensor's shape.

    Returns:
      ``H`` planes.
    """
    hidden = weights.shape[1]
    small: dict[tuple[int, ...], Array] = {}
    for j, x in enumerate(planes):
        if x.shape != shape:
            term = x[None] * weights[j]
            small[x.shape] = small[x.shape] + term if x.shape in small else term
    big = [j for j, x in enumerate(planes) if x.shape == shape]
    out = []
    for h in range(hidden):
        terms = [planes[j] * weights[j, h] for j in big] + [s[h] for s in small.values()]
        out.append(sum(terms[1:], terms[0]) + bias[h])
    return out
