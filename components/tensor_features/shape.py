"""The tensor's own shape in numbers."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from celo_nnx.errors import MOST_WIDTH, is_width, require
from celo_nnx.interfaces import RunView, TensorFeature

Array = jax.Array


class ShapeFeature(TensorFeature):
    """A feature of the own shape; such a row differs between tensors, so the schedule has one for each."""

    looks = True

    def width(self, sizes: dict[str, int]) -> int:
        return 1

    def shape(self, view: RunView) -> tuple[int, ...]:
        """Returns the tensor's own shape."""
        assert view.spec is not None
        return view.spec.tensor_shape


class Rank(ShapeFeature):
    """One-hot of the number of axes longer than 1; zeros where that is ``size`` or more (V3).

    Args:
      size: at least 1.
    """

    def __init__(self, *, size: int = 5) -> None:
        require(is_width(size), "size", size, f"an integer from 1 to {MOST_WIDTH}")
        self.size = size

    def width(self, sizes: dict[str, int]) -> int:
        return self.size

    def values(self, view: RunView) -> Array:
        axes = sum(n > 1 for n in self.shape(view))
        return jnp.asarray(np.arange(self.size) == axes, jnp.float32)


class IsRank(ShapeFeature):
    """1 where the tensor has ``rank`` axes, else -1.

    Args:
      rank: 0 or more.
    """

    def __init__(self, *, rank: int = 0) -> None:
        require(type(rank) is int and rank >= 0, "rank", rank, "an integer of at least 0")
        self.rank = rank

    def values(self, view: RunView) -> Array:
        return jnp.full((1,), 1.0 if len(self.shape(view)) == self.rank else -1.0, jnp.float32)


class LogShape(ShapeFeature):
    """``log(n) - 1`` of the first ``axes`` sizes, as if sizes of 1 followed.

    Args:
      axes: at least 1.
    """

    def __init__(self, *, axes: int = 4) -> None:
        require(is_width(axes), "axes", axes, f"an integer from 1 to {MOST_WIDTH}")
        self.axes = axes

    def width(self, sizes: dict[str, int]) -> int:
        return self.axes

    def values(self, view: RunView) -> Array:
        padded = [*self.shape(view), *(1,) * self.axes][: self.axes]
        return jnp.asarray(np.log(padded) - 1.0, jnp.float32)


class LogSize(ShapeFeature):
    """``log(N)`` of the number of elements."""

    def values(self, view: RunView) -> Array:
        return jnp.full((1,), math.log(math.prod(self.shape(view))), jnp.float32)
