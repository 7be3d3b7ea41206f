"""How accumulators are kept between updates: float32, or bfloat16 with one of two roundings."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from celo_nnx.errors import is_name, unknown

Array = jax.Array
PyTree = Any

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
ROUNDINGS = ("nearest", "stochastic")
HALVES = (jnp.bfloat16, jnp.uint16)  # bfloat16 as it is, and as bits


@dataclasses.dataclass(frozen=True)
class Storage:
    """The section ``optimizer.state`` of a config; the arithmetic is float32 whatever is stored.

    Attributes:
      dtype: ``"float32"`` or ``"bfloat16"``: of accumulators as large as their tensor, on the learned and
        on hand-made routes. Row and column averages stay float32.
      rounding: of bfloat16. ``"stochastic"`` rounds up with a probability equal to the remainder, so an
        average is right in expectation; the noise is a hash of the update's number, the tensor and the
        element, so a run repeats bit for bit. ``"nearest"`` loses an average's increments below 2**-9 of it:
        with decay 0.999 a momentum near its gradient stops moving, and a second moment may stop decaying.

    Raises:
      UserError: another dtype or rounding.

    Example:
      >>> Storage("bfloat16").store(jnp.ones(3), jnp.uint32(0)).dtype.name
      'bfloat16'
    """

    dtype: str = "float32"
    rounding: str = "stochastic"

    def __post_init__(self) -> None:
        if not is_name(self.dtype, DTYPES):
            raise unknown("optimizer.state.dtype", self.dtype, DTYPES)
        if self.rounding not in ROUNDINGS:
            raise unknown("optimizer.state.rounding", self.rounding, ROUNDINGS)

    @property
    def exact(self) -> bool:
        """Whether storing changes nothing."""
        return self.dtype == "float32"

    def init(self, tree: PyTree, shape: tuple[int, ...] | None = None) -> PyTree:
        """Returns an initial state as it is stored.

        Args:
          tree: float32 arrays, and integer ones that stay as they are.
          shape: the tensor's working shape: smaller arrays stay float32. None for a hand-made rule's state,
            of which scalars stay float32.
        """

        def cast(x: Array) -> Array:
            large = x.ndim > 0 if shape is None else x.shape[x.ndim - len(shape) :] == shape
            return x.astype(DTYPES[self.dtype]) if large and x.dtype == jnp.float32 else x

        return tree if self.exact else jax.tree.map(cast, tree)

    def load(self, tree: PyTree) -> PyTree:
        """Returns a stored state, or its :func:`bits`, in float32."""
        return jax.tree.map(lambda x: to_float32(x) if x.dtype in HALVES else x, tree)

    def keep(self, new: PyTree, old: PyTree, seed: Array, offset: Array | int = 0) -> PyTree:
        """Returns the next state as ``old`` was stored; ``seed`` and ``offset`` as in :meth:`store`."""
        if self.exact:
            return new
        leaves, tree = jax.tree.flatten(old)
        kept = []
        for i, (x, y) in enumerate(zip(tree.flatten_up_to(new), leaves, strict=True)):
            if y.dtype in HALVES:
                x = self.store(x, mix(seed, i), offset)
                x = bits(x) if y.dtype == jnp.uint16 else x
            kept.append(x)
        return tree.unflatten(kept)

    def store(self, x: Array, seed: Array, offset: Array | int = 0) -> Array:
        """Rounds one float32 array.

        Args:
          x: ``[..., n, m]`` or ``[n]``.
          seed: uint32 scalar, another for every update and array.
          offset: index of the first element of every matrix, where ``x`` is a tile of more rows.
        """
        if self.exact:
            return x
        if self.rounding == "nearest":
            return x.astype(jnp.bfloat16)
        bits = lax.bitcast_convert_type(x, jnp.uint32)
        # bfloat16 is the upper half of float32: adding noise below it rounds up with the right probability.
        up = (bits + (_noise(x.shape, seed, offset) & 0xFFFF)) & jnp.uint32(0xFFFF0000)
        rounded = lax.bitcast_convert_type(up, jnp.float32)
        return jnp.where(jnp.isfinite(rounded), rounded, x).astype(jnp.bfloat16)


def bits(tree: PyTree) -> PyTree:
    """Returns bfloat16 arrays as uint16, others as they are: for loops that slice or update them.

    XLA's CPU compiler has no bfloat16 slices: it converts the whole array to float32 for each of them.
    """

    def cast(x: Array) -> Array:
        return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x

    return jax.tree.map(cast, tree)


def from_bits(tree: PyTree, like: PyTree) -> PyTree:
    """Returns what :func:`bits` was given, of the dtypes of ``like``."""
    return jax.tree.map(lambda x, y: _bfloat16(x) if y.dtype == jnp.bfloat16 else x, tree, like)


def to_float32(x: Array) -> Array:
    """Returns a floating-point array, or the :func:`bits` of a bfloat16 one, in float32."""
    return (_bfloat16(x) if x.dtype == jnp.uint16 else x).astype(jnp.float32)


def _bfloat16(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def mix(seed: Array, number: Array | int) -> Array:
    """Returns a uint32 that depends on both, well mixed: two rounds of multiply and shift."""
    x = jnp.asarray(seed, jnp.uint32) ^ (jnp.asarray(number, jnp.uint32) * jnp.uint32(0x9E3779B9))
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _noise(shape: tuple[int, ...], seed: Array, offset: Array | int) -> Array:
    """Returns a uint32 for each element, from its index within the array that ``shape`` is a tile of."""
    last = shape[-1] if shape else 1
    inner = shape[-2:] or (1,)
    index = jnp.asarray(offset, jnp.uint32) * jnp.uint32(last)
    for axis, stride in zip(range(len(inner) - 1, -1, -1), (1, last), strict=False):
        index = index + lax.broadcasted_iota(jnp.uint32, inner, axis) * jnp.uint32(stride)
    for axis, size in enumerate(reversed(shape[:-2])):
        lead = lax.broadcasted_iota(jnp.uint32, (size,) + (1,) * (axis + 2), 0)
        index = index ^ mix(jnp.uint32(axis + 1), lead)
    return jnp.broadcast_to(mix(seed, index), shape)
