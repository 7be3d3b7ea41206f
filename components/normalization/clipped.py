"""A ceiling on the root mean square."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from celo_nnx.components.normalization.second_moment import SecondMomentNorm
from celo_nnx.errors import require

Array = jax.Array


class ClippedNorm(SecondMomentNorm):
    """``N(x) = gain x min(1, limit / sqrt(eps + mean_A(x^2)))``: small planes pass, large ones are cut.

    The rule by which Adafactor limits its update (Shazeer and Stern 2018, section 6), there with limit 1.

    Args:
      limit: largest root mean square that passes, above 0.
      axes, eps, gain: as in :class:`~celo_nnx.components.normalization.second_moment.SecondMomentNorm`.

    Example:
      >>> ClippedNorm(limit=1.0).scale(jnp.float32([0.25, 4.0])).tolist()
      [1.0, 0.5]
    """

    def __init__(
        self, *, limit: float = 1.0, axes: str = "matrix", eps: float = 1e-9, gain: float = 1.0
    ) -> None:
        super().__init__(axes=axes, eps=eps, gain=gain)
        require(limit > 0, "limit", limit, "a number above 0")
        self.limit = float(limit)

    def scale(self, mean_square: Array) -> Array:
        return jnp.minimum(self.gain, self.limit * super().scale(mean_square))
