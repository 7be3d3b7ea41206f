"""Division by the root mean square over chosen axes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from celo_nnx.errors import require, unknown
from celo_nnx.interfaces import Normalization, TensorSpec

Array = jax.Array

AXES = ("matrix", "all", "rows", "columns")


class SecondMomentNorm(Normalization):
    """``N(x) = gain x / sqrt(eps + mean_A(x^2))``, each plane by itself (OPTIMIZERS 1.7, E6 and E7).

    Args:
      axes: the axes A of the mean: ``"matrix"`` the tensor's matrix axes, leading axes being a batch
        (Celo2); ``"all"`` (Celo, VeLO); ``"rows"`` or ``"columns"`` one mean for each row (over the
        matrix's last axis) or column.
      eps: above 0 (Celo2 1e-9; Celo and VeLO 1e-5).
      gain: constant factor, above 0.

    Example:
      >>> float(SecondMomentNorm(eps=1e-9).scale(jnp.float32(4.0)))
      0.5
    """

    def __init__(self, *, axes: str = "matrix", eps: float = 1e-9, gain: float = 1.0) -> None:
        if axes not in AXES:
            raise unknown("axes", axes, AXES)
        require(eps > 0, "eps", eps, "a number above 0")
        require(gain > 0, "gain", gain, "a number above 0")
        self.over, self.eps, self.gain = axes, float(eps), float(gain)

    def axes(self, spec: TensorSpec) -> tuple[int, ...]:
        if self.over == "all" or spec.matrix is None:
            return tuple(range(len(spec.shape)))
        if self.over == "matrix":
            return tuple(sorted(spec.matrix))
        return (spec.matrix[1] if self.over == "rows" else spec.matrix[0],)

    def scale(self, mean_square: Array) -> Array:
        return self.gain * lax.rsqrt(self.eps + mean_square)


class Identity(Normalization):
    """Leaves planes as they are, but for a constant factor.

    Args:
      gain: the factor, above 0.
    """

    def __init__(self, *, gain: float = 1.0) -> None:
        require(gain > 0, "gain", gain, "a number above 0")
        self.gain = float(gain)

    def axes(self, spec: TensorSpec) -> tuple[int, ...]:
        return tuple(range(len(spec.shape)))

    def scale(self, mean_square: Array) -> Array:
        return jnp.full_like(mean_square, self.gain)
