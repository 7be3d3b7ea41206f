"""What the banks of exponential averages share: one average for each decay, the bank axis leading."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from celo_nnx.errors import require
from celo_nnx.interfaces import Accumulator

Array = jax.Array


class Bank(Accumulator):
    """Exponential averages ``a_k <- d_k a_k + (1 - d_k) x``, ``1 - d_k`` in float32 (OPTIMIZERS 1.1).

    Args:
      decays: one in [0, 1) for each average; ``k`` of them.

    Raises:
      UserError: a decay is out of range, or there is none.
    """

    def __init__(self, *, decays: tuple[float, ...]) -> None:
        decays = tuple(float(d) for d in decays)
        legal = "a tuple of at least one number in [0, 1)"
        require(len(decays) > 0 and all(0 <= d < 1 for d in decays), "decays", decays, legal)
        self.decays = decays

    @property
    def size(self) -> int:
        """Number of averages."""
        return len(self.decays)

    def mix(self, average: Array, value: Array) -> Array:
        """Returns the averages ``[k, *s]`` after ``value`` of shape ``[*s]``."""
        decay = jnp.asarray(self.decays, jnp.float32).reshape((-1,) + (1,) * value.ndim)
        return average * decay + value[None] * (1 - decay)
