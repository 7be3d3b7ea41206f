"""Evaluates a function of stacked planes one plane at a time, for compilers that only know single tiles.

Parts compute on banks, ``[k, *S]``, and index small weights, ``w[j, h]``. Triton has neither slices nor
arrays whose size is not a power of two. So a part's arithmetic is traced to a jaxpr, and the jaxpr is
evaluated with every array held in cells: scalars, or two-dimensional tiles that cover the last two axes.
Slicing, stacking and reshaping then only move cells about while the kernel is traced; broadcasts are kept
for last, so a row factor stays a row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array

LARGEST = 4096  # scalars that one array may be held in

ELEMENTWISE = frozenset(
    "abs acos add and asin atan atan2 bitcast_convert_type cbrt ceil clamp convert_element_type cos cosh div "
    "eq exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg not or "
    "pow rem rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square "
    "sub tan tanh xor".split()
)
"""Primitives that act element by element and that Pallas lowers for GPU and TPU."""


class UnsupportedError(Exception):
    """A function cannot be evaluated in cells: it mixes elements, or is too large."""


@dataclasses.dataclass(frozen=True)
class Cells:
    """An array in pieces.

    Attributes:
      shape: the array's.
      cells: objects, of as many axes as ``shape``, of size 1 on an axis along which the array is constant
        or which the cells cover. A cell is a scalar, or a tile ``[a, b]`` that covers the last two axes,
        its own sizes being theirs or 1.
    """

    shape: tuple[int, ...]
    cells: np.ndarray

    @property
    def tiled(self) -> bool:
        """Whether cells are tiles."""
        return any(np.ndim(cell) == 2 for cell in self.cells.flat)

    @staticmethod
    def of(cells: Sequence[Any], shape: tuple[int, ...], laid: tuple[int, ...]) -> Cells:
        """Returns an array of ``shape`` from a list of cells, laid out ``[*laid]``."""
        flat = np.empty(len(cells), object)
        for i, cell in enumerate(cells):
            flat[i] = cell
        return Cells(tuple(shape), flat.reshape(laid))

    @staticmethod
    def scalars(x: Array | np.ndarray, read: Callable[[int], Any] | None = None) -> Cells:
        """Returns a small array with a cell for each element.

        Args:
          x: the array; only its shape is looked at where ``read`` is given.
          read: returns the element with a flat index; numpy scalars of ``x``'s values by default.
        """
        size = math.prod(x.shape)
        if size > LARGEST:
            raise UnsupportedError(f"an array of shape {x.shape} has more than {LARGEST} elements")
        if read is None:
            read = np.asarray(x).reshape(-1).__getitem__
        return Cells.of([read(i) for i in range(size)], x.shape, x.shape)


def evaluate(closed: Any, consts: Sequence[Cells], args: Sequence[Cells]) -> list[Cells]:
    """Evaluates a closed jaxpr in cells.

    Args:
      closed: from ``jax.make_jaxpr``.
      consts: in the place of its own constants.
      args: the arguments.

    Raises:
      UnsupportedError: a primitive that is not elementwise and does more than move cells.

    Example:
      >>> closed = jax.make_jaxpr(lambda x: x[0] * 2.0 + x[1])(jax.ShapeDtypeStruct((2, 4, 8), jnp.float32))
      >>> tiles = [jnp.ones((4, 8)), jnp.ones((4, 8))]
      >>> out, = evaluate(closed, [], [Cells.of(tiles, (2, 4, 8), (2, 1, 1))])
      >>> out.shape, float(out.cells[0, 0][0, 0])
      ((4, 8), 3.0)
    """
    jaxpr = closed.jaxpr
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom: Any) -> Cells:
        return Cells.scalars(np.asarray(atom.val)) if hasattr(atom, "val") else known[atom]

    for eqn in jaxpr.eqns:
        name, operands = eqn.primitive.name, [read(atom) for atom in eqn.invars]
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if name in ("jit", "pjit", "closed_call", "custom_jvp_call"):
            own = [Cells.scalars(_concrete(x)) for x in inner.consts]
            made = evaluate(inner, own, operands)
        elif name in ELEMENTWISE:
            made = [_elementwise(eqn, operands)]
        elif name in MOVES:
            made = [MOVES[name](eqn.outvars[0].aval, *operands, **eqn.params)]
        else:
            raise UnsupportedError(f"the primitive {name!r} is not elementwise")
        known.update(zip(eqn.outvars, made, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _concrete(x: Any) -> np.ndarray:
    if isinstance(x, jax.core.Tracer):
        raise UnsupportedError("a nested function captures a traced array")
    return np.asarray(x)


def _elementwise(eqn: Any, operands: list[Cells]) -> Cells:
    laid = np.broadcast_shapes(*(x.cells.shape for x in operands))
    columns = [np.broadcast_to(x.cells, laid).reshape(-1) for x in operands]
    made = []
    for cells in zip(*columns, strict=True):
        shape = np.broadcast_shapes(*(np.shape(cell) for cell in cells))
        full = [cell if np.shape(cell) == shape else jnp.broadcast_to(cell, shape) for cell in cells]
        out = eqn.primitive.bind(*full, **eqn.params)
        if eqn.primitive.name in ("max", "min", "clamp") and jnp.issubdtype(out.dtype, jnp.floating):
            # Triton's max(nan, 0) is 0: a broken gradient would pass as a good one.
            for cell, x in zip(cells, full, strict=True):
                out = out if isinstance(cell, np.generic) else jnp.where(x != x, x, out)
        made.append(out)
    return Cells.of(made, eqn.outvars[0].aval.shape, laid)


# --- primitives that move cells: (result's aval, operands, the primitive's parameters) ----------------------


def _broadcast_in_dim(aval: Any, x: Cells, *, broadcast_dimensions: tuple[int, ...], **_: Any) -> Cells:
    rank = len(aval.shape)
    if x.tiled and tuple(broadcast_dimensions[-2:]) != (rank - 2, rank - 1):
        raise UnsupportedError("a plane is moved off the last two axes")
    laid = [1] * rank
    for own, to in enumerate(broadcast_dimensions):
        laid[to] = x.cells.shape[own]
    return Cells(aval.shape, x.cells.reshape(laid))


def _reshape(aval: Any, x: Cells, *, dimensions: Any, **_: Any) -> Cells:
    if dimensions is not None:
        raise UnsupportedError("a reshape that reorders axes")
    if not x.tiled:
        return Cells(aval.shape, _full(x).reshape(aval.shape))
    if aval.shape[-2:] != x.shape[-2:]:
        raise UnsupportedError("a plane is reshaped")
    return Cells(aval.shape, _full(x).reshape(*aval.shape[:-2], 1, 1))


def _squeeze(aval: Any, x: Cells, *, dimensions: tuple[int, ...], **_: Any) -> Cells:
    if x.tiled and any(axis >= len(x.shape) - 2 for axis in dimensions):
        raise UnsupportedError("a plane loses an axis")
    return Cells(aval.shape, np.squeeze(x.cells, tuple(dimensions)))


def _slice(aval: Any, x: Cells, *, start_indices: Any, limit_indices: Any, strides: Any) -> Cells:
    cut = []
    ranges = zip(start_indices, limit_indices, strides or [1] * len(x.shape), strict=True)
    for axis, (start, limit, stride) in enumerate(ranges):
        if x.tiled and axis >= len(x.shape) - 2 and aval.shape[axis] != x.shape[axis]:
            raise UnsupportedError("a plane is sliced")
        cut.append(slice(None) if x.cells.shape[axis] == 1 else slice(start, limit, stride))
    return Cells(aval.shape, x.cells[tuple(cut)])


def _concatenate(aval: Any, *operands: Cells, dimension: int) -> Cells:
    if any(x.tiled for x in operands) and dimension >= len(aval.shape) - 2:
        raise UnsupportedError("planes are concatenated along their own axes")
    around = [tuple(1 if a == dimension else n for a, n in enumerate(x.cells.shape)) for x in operands]
    around = np.broadcast_shapes(*around)
    pieces = []
    for x in operands:
        laid = tuple(x.shape[a] if a == dimension else n for a, n in enumerate(around))
        pieces.append(np.broadcast_to(x.cells, laid))
    return Cells(aval.shape, np.concatenate(pieces, dimension))


def _stack(aval: Any, *operands: Cells, axis: int) -> Cells:
    apart = [Cells((*x.shape[:axis], 1, *x.shape[axis:]), np.expand_dims(x.cells, axis)) for x in operands]
    return _concatenate(aval, *apart, dimension=axis)


def _iota(aval: Any, *, dtype: Any, shape: tuple[int, ...], dimension: int, **_: Any) -> Cells:
    rank, count = len(shape), shape[dimension]
    if dimension >= rank - 2 and rank >= 2 and math.prod(shape[-2:]) > 1:
        tile = tuple(shape[-2:])
        cells: list[Any] = [lax.broadcasted_iota(dtype, tile, dimension - rank + 2)]
        return Cells.of(cells, shape, (1,) * rank)
    laid = tuple(count if a == dimension else 1 for a in range(rank))
    return Cells.of([np.dtype(dtype).type(i) for i in range(count)], shape, laid)


def _full(x: Cells) -> np.ndarray:
    """Returns the cells with no axis left to broadcast but those that tiles cover."""
    return np.broadcast_to(x.cells, (*x.shape[:-2], 1, 1) if x.tiled else x.shape)


MOVES: dict[str, Callable[..., Cells]] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "slice": _slice,
    "concatenate": _concatenate,
    "stack": _stack,
    "iota": _iota,
}
